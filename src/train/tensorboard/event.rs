//! The protobuf messages of event files (`tensorflow.Event`, `tensorflow.Summary`), encoded by hand.

/// One `Event` message.
pub(super) struct Event<'a> {
    /// Seconds since 1970.
    pub(super) wall_time: f64,
    pub(super) step: u64,
    pub(super) what: What<'a>,
}

/// What an event tells.
pub(super) enum What<'a> {
    /// First of every file: the version of the format.
    FileVersion,
    /// A run was resumed at the event's step.
    SessionStart,
    /// Numbers or pictures.
    Summary(Vec<SummaryValue<'a>>),
}

/// One `Summary.Value` message.
pub(super) enum SummaryValue<'a> {
    Scalar { tag: &'a str, value: f32 },
    Image { tag: &'a str, width: u32, height: u32, png: &'a [u8] },
}

impl Event<'_> {
    /// The message's bytes. Field numbers are those of tensorflow/core/util/event.proto and framework/summary.proto.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut event = Message::default();
        event.double(1, self.wall_time);
        event.varint(2, self.step);
        match &self.what {
            What::FileVersion => event.bytes(3, b"brain.Event:2"),
            What::SessionStart => {
                let mut session_log = Message::default();
                session_log.varint(1, 1);
                event.bytes(7, &session_log.0);
            }
            What::Summary(values) => {
                let mut summary = Message::default();
                for value in values {
                    summary.bytes(1, &value.encode());
                }
                event.bytes(5, &summary.0);
            }
        }
        event.0
    }
}

impl SummaryValue<'_> {
    fn encode(&self) -> Vec<u8> {
        let mut message = Message::default();
        match self {
            SummaryValue::Scalar { tag, value } => {
                message.bytes(1, tag.as_bytes());
                message.float(2, *value);
            }
            SummaryValue::Image { tag, width, height, png } => {
                let mut image = Message::default();
                image.varint(1, u64::from(*height));
                image.varint(2, u64::from(*width));
                image.varint(3, 3); // RGB
                image.bytes(4, png);
                message.bytes(1, tag.as_bytes());
                message.bytes(4, &image.0);
            }
        }
        message.0
    }
}

/// A protobuf message that grows field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}
