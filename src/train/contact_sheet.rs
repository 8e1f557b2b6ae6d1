//! Pictures laid out in captioned rows.

use image::{Rgb, RgbImage, imageops};

use super::pixel_font::{GLYPH_HEIGHT, GLYPH_WIDTH, draw_text};
use crate::{Error, Result};

const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const INK: Rgb<u8> = Rgb([40, 40, 44]);

/// A sheet of pictures of one size, in rows, each with a caption below it.
#[derive(Clone, Debug)]
pub struct ContactSheet {
    cell: (u32, u32),
    rows: Vec<Vec<(String, RgbImage)>>,
}

impl ContactSheet {
    /// An empty sheet for pictures of this size in pixels.
    pub fn new(cell_width: u32, cell_height: u32) -> Self {
        ContactSheet { cell: (cell_width, cell_height), rows: Vec::new() }
    }

    /// Adds a row of captions and pictures, left to right. A caption wider than its picture ends in dots; an empty one
    /// leaves its place empty. Rows may differ in length.
    ///
    /// # Errors
    /// [`Error::Argument`] where a picture is not of the sheet's size; then no row was added.
    pub fn add_row(&mut self, cells: Vec<(String, RgbImage)>) -> Result<()> {
        if let Some((caption, picture)) = cells.iter().find(|(_, picture)| picture.dimensions() != self.cell) {
            let size = |(width, height): (u32, u32)| format!("{width}x{height} pixels");
            let found = format!("{} for `{caption}`", size(picture.dimensions()));
            return Err(Error::argument("ContactSheet::add_row", "cells", size(self.cell), found));
        }
        self.rows.push(cells);
        Ok(())
    }

    /// Draws the sheet. One without pictures is a blank margin.
    pub fn render(&self) -> RgbImage {
        let scale = (self.cell.0 / 256).max(1);
        let margin = 6 * scale;
        let caption_height = (GLYPH_HEIGHT + 4) * scale;
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let (step_x, step_y) = (self.cell.0 + margin, self.cell.1 + caption_height + margin);
        let mut sheet =
            RgbImage::from_pixel(columns * step_x + margin, self.rows.len() as u32 * step_y + margin, PAPER);
        for (row, cells) in self.rows.iter().enumerate() {
            let top = margin + row as u32 * step_y;
            for (column, (caption, picture)) in cells.iter().enumerate() {
                let left = margin + column as u32 * step_x;
                imageops::replace(&mut sheet, picture, i64::from(left), i64::from(top));
                let caption = shortened(caption, self.cell.0, scale);
                draw_text(&mut sheet, left, top + self.cell.1 + 2 * scale, scale, INK, &caption);
            }
        }
        sheet
    }
}

/// The text, or its beginning and two dots where it is wider than `width` pixels.
fn shortened(text: &str, width: u32, scale: u32) -> String {
    let fitting = ((width / scale + 1) / (GLYPH_WIDTH + 1)) as usize;
    if text.chars().count() <= fitting {
        return text.to_string();
    }
    text.chars().take(fitting.saturating_sub(2)).chain("..".chars().take(fitting)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::pixel_font::text_width;
    use super::*;

    fn plain(value: u8) -> RgbImage {
        RgbImage::from_pixel(64, 32, Rgb([value; 3]))
    }

    #[test]
    fn pictures_stand_in_rows_with_captions_below() {
        let mut sheet = ContactSheet::new(64, 32);
        sheet.add_row(vec![("reference".into(), plain(1)), (String::new(), plain(2))]).unwrap();
        sheet.add_row(vec![("sample".into(), plain(3))]).unwrap();
        let picture = sheet.render();
        assert_eq!(picture.dimensions(), (6 + 2 * (64 + 6), 6 + 2 * (32 + 11 + 6)));
        for (x, y, value) in [(6, 6, 1), (69, 37, 1), (76, 6, 2), (6, 55, 3)] {
            assert_eq!(picture.get_pixel(x, y), &Rgb([value; 3]), "({x}, {y})");
        }
        let has_ink = |x: u32| (x..x + 64).any(|x| (40..47).any(|y| picture.get_pixel(x, y) == &INK));
        assert!(has_ink(6) && !has_ink(76));
        assert_eq!(picture.get_pixel(76, 55), &PAPER);
    }

    #[test]
    fn a_picture_of_another_size_is_refused() {
        let mut sheet = ContactSheet::new(64, 32);
        let error = sheet.add_row(vec![("odd".into(), RgbImage::new(10, 20))]).unwrap_err().to_string();
        assert!(error.contains("expected 64x32 pixels, found 10x20 pixels for `odd`"), "{error}");
        assert_eq!(sheet.render().dimensions(), (6, 6));
    }

    #[test]
    fn a_long_caption_stays_within_its_picture() {
        let caption = shortened("an oil painting of a face", 64, 1);
        assert_eq!(caption, "an oil p..");
        assert!(text_width(&caption, 1) <= 64);
        assert_eq!(shortened("abc", 0, 1), "");
        assert_eq!(shortened("sample", 64, 1), "sample");
    }
}
