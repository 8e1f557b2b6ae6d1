//! From the network's numbers to faces, as OpenCV's `FaceDetectorYN`.

use crate::face::Landmarks;

/// The most detections that are compared with each other, the best ones (OpenCV: `top_k`).
const MOST: usize = 5000;

/// A face.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// How sure the network is, in `[0, 1]`.
    pub score: f64,
    /// Left, top, width and height, in pixels.
    pub bounds: [f64; 4],
    /// The landmarks, in pixels.
    pub landmarks: Landmarks,
}

impl Detection {
    /// The area of the bounds.
    pub(super) fn area(&self) -> f64 {
        self.bounds[2] * self.bounds[3]
    }

    /// The same in an image that is so many times wider and higher. Places are pixel centres.
    pub(super) fn scaled(&self, [x, y]: [f64; 2]) -> Self {
        let moved = |[px, py]: [f64; 2]| [(px + 0.5) * x - 0.5, (py + 0.5) * y - 0.5];
        let [left, top] = moved([self.bounds[0], self.bounds[1]]);
        Detection {
            bounds: [left, top, self.bounds[2] * x, self.bounds[3] * y],
            landmarks: self.landmarks.map(moved),
            ..*self
        }
    }

    fn overlap(&self, other: &Self) -> f64 {
        let shared = |axis: usize| {
            let end = |d: &Self| d.bounds[axis] + d.bounds[axis + 2];
            (end(self).min(end(other)) - self.bounds[axis].max(other.bounds[axis])).max(0.0)
        };
        let both = shared(0) * shared(1);
        both / (self.area() + other.area() - both).max(f64::MIN_POSITIVE)
    }
}

/// The network's numbers at one stride for one image, places row by row.
pub(super) struct Grid {
    pub stride: usize,
    pub width: usize,
    pub scores: Vec<f64>,
    pub objectness: Vec<f64>,
    pub boxes: Vec<f64>,
    pub landmarks: Vec<f64>,
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// All faces of at least this score.
pub(super) fn decode(levels: &[Grid], score_threshold: f64) -> Vec<Detection> {
    let mut found = Vec::new();
    for grid in levels {
        let stride = grid.stride as f64;
        for (place, (score, objectness)) in grid.scores.iter().zip(&grid.objectness).enumerate() {
            let score = (logistic(*score) * logistic(*objectness)).sqrt();
            if score.is_nan() || score < score_threshold {
                continue;
            }
            let (column, row) = ((place % grid.width) as f64, (place / grid.width) as f64);
            let numbers = &grid.boxes[4 * place..4 * place + 4];
            let (width, height) = (numbers[2].exp() * stride, numbers[3].exp() * stride);
            let (x, y) = ((column + numbers[0]) * stride, (row + numbers[1]) * stride);
            let points = &grid.landmarks[10 * place..10 * place + 10];
            found.push(Detection {
                score,
                bounds: [x - width / 2.0, y - height / 2.0, width, height],
                landmarks: std::array::from_fn(|i| {
                    [(points[2 * i] + column) * stride, (points[2 * i + 1] + row) * stride]
                }),
            });
        }
    }
    found
}

/// Drops faces that overlap one of higher score; by falling score.
pub(super) fn suppress(mut found: Vec<Detection>, overlap_threshold: f64) -> Vec<Detection> {
    found.sort_by(|a, b| b.score.total_cmp(&a.score));
    found.truncate(MOST);
    let mut kept: Vec<Detection> = Vec::new();
    for face in found {
        if kept.iter().all(|other| face.overlap(other) <= overlap_threshold) {
            kept.push(face);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn face(score: f64, bounds: [f64; 4]) -> Detection {
        Detection { score, bounds, landmarks: [[0.0; 2]; 5] }
    }

    #[test]
    fn a_place_of_the_grid_becomes_a_face_in_pixels() {
        let mut grid = Grid {
            stride: 8,
            width: 3,
            scores: vec![-9.0; 6],
            objectness: vec![9.0; 6],
            boxes: vec![0.0; 24],
            landmarks: vec![0.0; 60],
        };
        grid.scores[4] = 9.0;
        grid.boxes[16..20].copy_from_slice(&[0.5, -0.25, 2f64.ln(), 3f64.ln()]);
        grid.landmarks[42] = 1.5;
        let found = decode(&[grid], 0.6);
        assert_eq!(found.len(), 1);
        // Column 1, row 1.
        let expected = [12.0 - 8.0, 6.0 - 12.0, 16.0, 24.0];
        assert!(found[0].bounds.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{:?}", found[0]);
        assert_eq!((found[0].landmarks[0], found[0].landmarks[1]), ([8.0, 8.0], [20.0, 8.0]));
    }

    #[test]
    fn of_overlapping_faces_the_surest_stays() {
        let faces = vec![
            face(0.7, [0.0, 0.0, 10.0, 10.0]),
            face(0.9, [1.0, 0.0, 10.0, 10.0]),
            face(0.8, [30.0, 0.0, 10.0, 10.0]),
            // Overlaps the surest by a quarter only.
            face(0.6, [7.0, 0.0, 10.0, 10.0]),
        ];
        let kept: Vec<f64> = suppress(faces, 0.3).iter().map(|face| face.score).collect();
        assert_eq!(kept, [0.9, 0.8, 0.6]);
    }

    #[test]
    fn a_face_moves_with_the_size_of_the_image() {
        let found = face(1.0, [9.5, 4.5, 10.0, 20.0]).scaled([2.0, 3.0]);
        assert_eq!(found.bounds, [19.5, 14.5, 20.0, 60.0]);
    }
}
