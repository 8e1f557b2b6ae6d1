//! The table of contents of a zip file whose members are stored as they are, as PyTorch writes it: with the 64-bit
//! extension, for checkpoints are larger than 4 GB.

use std::collections::BTreeMap;
use std::ops::Range;

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const CENTRAL: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";
const END_LENGTH: usize = 22;
/// What PyTorch writes for a field whose value is in the 64-bit extension.
const SEE_64: u64 = 0xffff_ffff;

struct Member {
    header: usize,
    method: u16,
    flags: u16,
    stored: usize,
    size: usize,
}

/// The members of a zip file, by name.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    members: BTreeMap<String, Member>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?)))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl<'a> Archive<'a> {
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        // The end record is last, but for a comment of at most 64 KB.
        let earliest = bytes.len().saturating_sub(END_LENGTH + 0xffff);
        let end = (earliest..=bytes.len().saturating_sub(END_LENGTH))
            .rev()
            .find(|at| bytes[*at..].starts_with(END))
            .ok_or("the table of contents at its end is missing (is the file cut off?)")?;
        Self::table(bytes, end).ok_or_else(|| "its table of contents is damaged".to_string())
    }

    fn table(bytes: &'a [u8], end: usize) -> Option<Self> {
        let (mut count, mut at) = (u64::from(u16_at(bytes, end + 10)?), u32_at(bytes, end + 16)?);
        let locator = end.checked_sub(20).filter(|at| bytes[*at..].starts_with(LOCATOR_64));
        if let Some(locator) = locator {
            let end_64 = usize::try_from(u64_at(bytes, locator + 8)?).ok()?;
            if !bytes.get(end_64..)?.starts_with(END_64) {
                return None;
            }
            (count, at) = (u64_at(bytes, end_64 + 32)?, u64_at(bytes, end_64 + 48)?);
        }
        let (mut members, mut at) = (BTreeMap::new(), usize::try_from(at).ok()?);
        // Every entry takes at least 46 bytes of the file, so a false count ends the loop and takes no memory.
        for _ in 0..count {
            if !bytes.get(at..)?.starts_with(CENTRAL) {
                return None;
            }
            let [name, extra, comment] = [28, 30, 32].map(|field| u16_at(bytes, at + field).map(usize::from));
            let (name_length, extra_length, comment_length) = (name?, extra?, comment?);
            let name_start = at + 46;
            let name = bytes.get(name_start..name_start + name_length)?;
            let extra = bytes.get(name_start + name_length..name_start + name_length + extra_length)?;
            let fields = [u32_at(bytes, at + 24)?, u32_at(bytes, at + 20)?, u32_at(bytes, at + 42)?];
            let [size, stored, header] = with_extension(fields, extra)?.map(usize::try_from);
            let member = Member {
                header: header.ok()?,
                method: u16_at(bytes, at + 10)?,
                flags: u16_at(bytes, at + 8)?,
                stored: stored.ok()?,
                size: size.ok()?,
            };
            // Two members of one name would let one file mean two things.
            if members.insert(String::from_utf8(name.to_vec()).ok()?, member).is_some() {
                return None;
            }
            at = name_start + name_length + extra_length + comment_length;
        }
        Some(Archive { bytes, members })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// Where a member lies in the file.
    pub fn member(&self, name: &str) -> Result<Range<usize>, String> {
        let member = self.members.get(name).ok_or("missing")?;
        if member.flags & 1 != 0 {
            return Err("encrypted".into());
        }
        if member.method != 0 || member.stored != member.size {
            // torch.save never compresses; what does is a few bytes that claim to be gigabytes, or no checkpoint.
            return Err(format!("compressed ({} bytes that claim to be {}), refused", member.stored, member.size));
        }
        let header = self.bytes.get(member.header..).filter(|header| header.starts_with(LOCAL));
        let header = header.ok_or("its header is damaged")?;
        let lengths = u16_at(header, 26).zip(u16_at(header, 28)).ok_or("its header is cut off")?;
        // The header lies in the file, so this cannot overflow.
        let start = member.header + 30 + usize::from(lengths.0) + usize::from(lengths.1);
        let end = start.checked_add(member.size).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("claims {} bytes, more than the file has", member.size))?;
        Ok(start..end)
    }
}

/// Size, stored size and place of the header, from the 64-bit extension where they do not fit into 32 bits.
fn with_extension(mut fields: [u64; 3], mut extra: &[u8]) -> Option<[u64; 3]> {
    while let (Some(kind), Some(length)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let end = 4 + usize::from(length);
        let mut values = extra.get(4..end)?;
        if kind == 1 {
            for field in fields.iter_mut().filter(|field| **field == SEE_64) {
                *field = u64_at(values, 0)?;
                values = &values[8..];
            }
        }
        extra = extra.get(end..)?;
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of one member, whose sizes and place are in the 64-bit extension, as in files beyond 4 GB.
    fn archive(content: &[u8], size: u64) -> Vec<u8> {
        let mut bytes = LOCAL.to_vec();
        bytes.extend([0; 22]);
        bytes.extend([1, 0, 0, 0]);
        bytes.push(b'a');
        bytes.extend(content);
        let directory = bytes.len() as u64;
        bytes.extend(CENTRAL);
        bytes.extend([0; 16]);
        bytes.extend([0xff; 8]);
        bytes.extend([1, 0, 28, 0]);
        bytes.extend([0; 10]);
        bytes.extend([0xff; 4]);
        bytes.push(b'a');
        bytes.extend([1, 0, 24, 0]);
        [size, size, 0].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        let end_64 = bytes.len() as u64;
        bytes.extend(END_64);
        bytes.extend([0; 28]);
        [1, 75, directory].iter().for_each(|field: &u64| bytes.extend(field.to_le_bytes()));
        bytes.extend(LOCATOR_64);
        bytes.extend([0; 4]);
        bytes.extend(end_64.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(END);
        bytes.extend([0; 4]);
        bytes.extend([0xff; 12]);
        bytes.extend([0; 2]);
        bytes
    }

    #[test]
    fn sizes_and_places_beyond_32_bits_are_read_from_the_extension() {
        let bytes = archive(b"numbers", 7);
        let span = Archive::read(&bytes).unwrap().member("a").unwrap();
        assert_eq!(&bytes[span], b"numbers");
    }

    #[test]
    fn a_member_that_claims_more_than_the_file_has_is_refused() {
        let bytes = archive(b"numbers", 1 << 50);
        let error = Archive::read(&bytes).unwrap().member("a").unwrap_err();
        assert_eq!(error, "claims 1125899906842624 bytes, more than the file has");
        let bytes = archive(b"numbers", u64::MAX);
        assert!(Archive::read(&bytes).unwrap().member("a").is_err());
    }
}
