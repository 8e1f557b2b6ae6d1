//! From the coordinates of a head to those of the picture.

use super::{Identity, Pose, canvas::Point};

/// How a style places the person in the picture: a scale and a vertical shift.
#[derive(Clone, Copy)]
pub(super) struct Framing {
    pub scale: f32,
    pub shift: f32,
}

/// The frame of a head: x to the right, y down, z towards the viewer, the origin in the middle of the head.
pub(super) struct Frame {
    origin: Point,
    scale: f32,
    roll: (f32, f32),
    yaw: (f32, f32),
    pitch: (f32, f32),
    half: Point,
}

impl Frame {
    pub fn new(identity: &Identity, pose: &Pose, framing: Framing) -> Self {
        Frame {
            origin: [pose.position[0] * framing.scale, pose.position[1] * framing.scale + framing.shift],
            scale: pose.scale * framing.scale,
            roll: pose.roll.sin_cos(),
            yaw: pose.yaw.sin_cos(),
            pitch: pose.pitch.sin_cos(),
            half: [identity.face_width, identity.face_height],
        }
    }

    /// A length of the head in units of the picture.
    pub fn length(&self, length: f32) -> f32 {
        length * self.scale
    }

    /// A point in space.
    pub fn at(&self, x: f32, y: f32, z: f32) -> Point {
        let across = x * self.yaw.1 + z * self.yaw.0;
        let depth = z * self.yaw.1 - x * self.yaw.0;
        let down = y * self.pitch.1 + depth * self.pitch.0;
        self.flat([across, down])
    }

    /// A point of the outline, which turning does not change; only the tilt moves it.
    pub fn flat(&self, p: Point) -> Point {
        let (sin, cos) = self.roll;
        [
            self.origin[0] + self.scale * (p[0] * cos - p[1] * sin),
            self.origin[1] + self.scale * (p[0] * sin + p[1] * cos),
        ]
    }

    /// A point on the front of the head, a half ellipsoid.
    pub fn face(&self, p: Point) -> Point {
        self.at(p[0], p[1], self.depth(p))
    }

    /// The height of the front of the head over the plane of its outline.
    pub fn depth(&self, p: Point) -> f32 {
        let r2 = (p[0] / self.half[0]).powi(2) + (p[1] / self.half[1]).powi(2) * 0.6;
        0.5 * (1.0 - r2).max(0.0).sqrt()
    }

    /// A point behind the head, which moves against the turn: hair at the back.
    pub fn back(&self, p: Point) -> Point {
        self.flat([p[0] - 0.16 * self.yaw.0, p[1]])
    }

    /// A point of the body, which neither turns nor tilts.
    pub fn body(&self, p: Point) -> Point {
        [self.origin[0] + self.scale * (p[0] - 0.3 * self.roll.0), self.origin[1] + self.scale * p[1]]
    }

    /// From the picture back to the plane of the head's outline.
    pub fn local(&self, p: Point) -> Point {
        let (sin, cos) = self.roll;
        let (x, y) = ((p[0] - self.origin[0]) / self.scale, (p[1] - self.origin[1]) / self.scale);
        [x * cos + y * sin, y * cos - x * sin]
    }

    /// Many points through one of the maps.
    pub fn map(&self, points: &[Point], map: impl Fn(&Self, Point) -> Point) -> Vec<Point> {
        points.iter().map(|&p| map(self, p)).collect()
    }
}
