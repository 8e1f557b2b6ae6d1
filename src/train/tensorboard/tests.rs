use super::record::masked_crc32c;
use super::*;

/// A decoded protobuf field.
#[derive(Clone, Debug, PartialEq)]
enum Field {
    Number(u64),
    Double(f64),
    Float(f32),
    Bytes(Vec<u8>),
}

impl Field {
    fn message(&self) -> Vec<(u64, Field)> {
        match self {
            Field::Bytes(bytes) => decode(bytes),
            other => panic!("expected a message, found {other:?}"),
        }
    }
}

fn text(value: &str) -> Field {
    Field::Bytes(value.as_bytes().to_vec())
}

fn read_varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = take::<1>(bytes)[0];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, rest) = bytes.split_at(N);
    *bytes = rest;
    head.try_into().unwrap()
}

fn decode(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = read_varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(read_varint(&mut bytes)),
            1 => Field::Double(f64::from_le_bytes(take(&mut bytes))),
            5 => Field::Float(f32::from_le_bytes(take(&mut bytes))),
            2 => {
                let length = read_varint(&mut bytes) as usize;
                let (value, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(value.to_vec())
            }
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

/// The events of a file, with every checksum checked.
fn events(path: &Path) -> Vec<Vec<(u64, Field)>> {
    let content = std::fs::read(path).unwrap();
    let mut rest = content.as_slice();
    let mut events = Vec::new();
    while !rest.is_empty() {
        let length: [u8; 8] = take(&mut rest);
        assert_eq!(u32::from_le_bytes(take(&mut rest)), masked_crc32c(&length));
        let (data, tail) = rest.split_at(u64::from_le_bytes(length) as usize);
        rest = tail;
        assert_eq!(u32::from_le_bytes(take(&mut rest)), masked_crc32c(data));
        events.push(decode(data));
    }
    events
}

/// An event's fields without its wall time, which must be there.
fn timeless(event: &[(u64, Field)]) -> Vec<(u64, Field)> {
    assert!(matches!(event[0], (1, Field::Double(seconds)) if seconds > 1.6e9));
    event[1..].to_vec()
}

#[test]
fn the_file_begins_with_its_version() {
    let directory = tempfile::TempDir::new().unwrap();
    let writer = EventWriter::create(directory.path(), 0).unwrap();
    let events = events(writer.path());
    assert_eq!(events.len(), 1);
    assert_eq!(timeless(&events[0]), [(2, Field::Number(0)), (3, text("brain.Event:2"))]);
}

#[test]
fn scalars_carry_step_tag_and_value() {
    let directory = tempfile::TempDir::new().unwrap();
    let mut writer = EventWriter::create(directory.path(), 0).unwrap();
    writer.scalars(300, &[("train/loss", 0.25), ("train/identity_loss", 0.5)]).unwrap();
    let event = timeless(&events(writer.path())[1]);
    assert_eq!(event[0], (2, Field::Number(300)));
    let values: Vec<_> = event[1].1.message().into_iter().map(|(_, value)| value.message()).collect();
    assert_eq!(values[0], [(1, text("train/loss")), (2, Field::Float(0.25))]);
    assert_eq!(values[1], [(1, text("train/identity_loss")), (2, Field::Float(0.5))]);
}

#[test]
fn a_picture_carries_its_size_and_png() {
    let directory = tempfile::TempDir::new().unwrap();
    let mut writer = EventWriter::create(directory.path(), 0).unwrap();
    let picture = image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8, y as u8, 7]));
    writer.image(5, "validation", &picture).unwrap();
    let event = timeless(&events(writer.path())[1]);
    let value = event[1].1.message()[0].1.message();
    assert_eq!(value[0], (1, text("validation")));
    let image = value[1].1.message();
    assert_eq!(image[..3], [(1, Field::Number(2)), (2, Field::Number(3)), (3, Field::Number(3))]);
    let Field::Bytes(png) = &image[3].1 else { panic!("no picture") };
    assert_eq!(image::load_from_memory(png).unwrap().to_rgb8(), picture);
}

#[test]
fn a_resumed_run_tells_where_it_begins() {
    let directory = tempfile::TempDir::new().unwrap();
    let writer = EventWriter::create(directory.path(), 40).unwrap();
    let event = timeless(&events(writer.path())[1]);
    assert_eq!(event[0], (2, Field::Number(40)));
    assert_eq!((event[1].0, event[1].1.message()), (7, vec![(1, Field::Number(1))]));
}
