//! Pickle's instructions, as far as tensors take them, as plain data in one flat table.
//!
//! Values refer to one another by their place in the table, so however deep a hostile file nests them, nothing here
//! recurses, and a table entry costs at least one byte of the file.

use std::collections::HashMap;

/// How many values a pickle may have, and how many may lie on its stack. A tensor takes some 25; the released checkpoint
/// has a hundred thousand.
const MOST_VALUES: usize = 1 << 22;

/// The place of a value in the table.
pub(super) type Id = usize;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A name of the allow-list.
    Name(Name),
    /// What `persistent_load` would be asked for.
    Persistent(Id),
    /// A name of the allow-list "called" with these arguments.
    Call(Name, Id),
}

/// The names a pickle may use. None of them is ever called: they say what the data beside them is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Name {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    /// `torch.FloatStorage` and its like.
    Storage(String),
    /// `torch.float32` and its like.
    Dtype,
    Device,
}

impl Name {
    fn known(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Name::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Name::RebuildParameter,
            ("torch", "Size") => Name::Size,
            ("torch", "device") => Name::Device,
            ("torch", "float16" | "bfloat16" | "float32" | "float64" | "int64" | "int32" | "uint8" | "bool") => {
                Name::Dtype
            }
            ("torch" | "torch.storage", class) if super::storage::storage_dtype(class).is_some() => {
                Name::Storage(class.to_string())
            }
            _ => return None,
        })
    }
}

/// All values of a pickle, and which of them is the result.
pub(super) struct Values {
    pub table: Vec<Value>,
    pub result: Id,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    table: Vec<Value>,
    stack: Vec<Id>,
    /// How high the stack was at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

/// Reads a pickle; also tells how many bytes it takes.
pub(super) fn read(bytes: &[u8]) -> Result<(Values, usize), String> {
    let mut reader =
        Reader { bytes, at: 0, table: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    while let Some(result) = reader.step()? {
        if let Some(result) = result {
            return Ok((Values { table: reader.table, result }, reader.at));
        }
    }
    Err("cut off".into())
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| format!("cut off at byte {}: {count} bytes more were announced", self.at))?;
        self.at += count;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn length(&mut self, bytes: usize) -> Result<usize, String> {
        usize::try_from(self.number(bytes)?).map_err(|_| format!("an absurd length at byte {}", self.at))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().take(1000).position(|byte| *byte == b'\n').ok_or("a name without end")?;
        let line = std::str::from_utf8(self.take(length)?).map_err(|_| "a name that is no text")?;
        self.take(1)?;
        Ok(line)
    }

    fn text(&mut self, length: usize) -> Result<Value, String> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "a text that is not UTF-8")?;
        Ok(Value::Text(text.to_string()))
    }

    fn push(&mut self, value: Value) {
        self.table.push(value);
        self.stack.push(self.table.len() - 1);
    }

    fn pop(&mut self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => Err(format!("an instruction without its operand at byte {}", self.at)),
        }
    }

    fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().ok_or_else(|| format!("an instruction without its operand at byte {}", self.at))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or_else(|| format!("an end without a beginning at byte {}", self.at))?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn remember(&mut self, key: u64) -> Result<(), String> {
        let key = u32::try_from(key).map_err(|_| "an absurd memo")?;
        self.memo.insert(key, self.top()?);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), String> {
        let id = u32::try_from(key).ok().and_then(|key| self.memo.get(&key));
        self.stack.push(*id.ok_or("a reference to a value that is not there")?);
        Ok(())
    }

    fn name(&mut self, module: &str, name: &str) -> Result<(), String> {
        let known = Name::known(module, name).ok_or_else(|| {
            let shown = |text: &str| text.chars().take(80).collect::<String>().escape_debug().to_string();
            format!(
                "it asks for `{}.{}`, which is no part of a file of tensors; nothing was executed",
                shown(module),
                shown(name)
            )
        })?;
        self.push(Value::Name(known));
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let dict = self.top()?;
        match self.table.get_mut(dict) {
            Some(Value::Dict(entries)) if items.len().is_multiple_of(2) => {
                entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err(format!("entries of something that is no dictionary at byte {}", self.at)),
        }
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        let list = self.top()?;
        match self.table.get_mut(list) {
            Some(Value::List(list)) => {
                list.extend_from_slice(items);
                Ok(())
            }
            _ => Err(format!("members of something that is no list at byte {}", self.at)),
        }
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Some(Value::Name(name)) = self.table.get(function).cloned() else {
            return Err(format!("a call of something that is no name at byte {}", self.at));
        };
        match name {
            // An empty one is filled by the instructions that follow, as a plain dictionary is.
            Name::OrderedDict if self.table.get(arguments) == Some(&Value::Tuple(Vec::new())) => {
                self.push(Value::Dict(Vec::new()));
            }
            name => self.push(Value::Call(name, arguments)),
        }
        Ok(())
    }

    /// One instruction. `Some(Some(id))` at the end of the program, `None` at the end of the bytes.
    fn step(&mut self) -> Result<Option<Option<Id>>, String> {
        let Some(instruction) = self.bytes.get(self.at).copied() else { return Ok(None) };
        if self.table.len().max(self.stack.len()).max(self.marks.len()) > MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        self.at += 1;
        match instruction {
            0x80 => {
                self.take(1)?;
            }
            0x95 => {
                self.take(8)?;
            }
            b'.' => return Ok(Some(Some(self.pop()?))),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => {
                let number = self.number(1)?;
                self.push(Value::Int(number as i64));
            }
            b'M' => {
                let number = self.number(2)?;
                self.push(Value::Int(number as i64));
            }
            b'J' => {
                let number = self.number(4)? as u32;
                self.push(Value::Int(i64::from(number as i32)));
            }
            0x8a => {
                let length = self.length(1)?;
                if length > 8 {
                    return Err("a number of more than 64 bits".into());
                }
                let number = self.number(length)?;
                let unused = 64 - 8 * length as u32;
                self.push(Value::Int(if length == 0 { 0 } else { (number << unused) as i64 >> unused }));
            }
            b'G' => {
                let number = self.number(8)?.swap_bytes();
                self.push(Value::Float(f64::from_bits(number)));
            }
            b'X' | b'T' | 0x8c | b'U' | 0x8d => {
                let length = self.length(match instruction {
                    b'X' | b'T' => 4,
                    0x8d => 8,
                    _ => 1,
                })?;
                let text = self.text(length)?;
                self.push(text);
            }
            b'B' | b'C' => {
                let length = self.length(if instruction == b'B' { 4 } else { 1 })?;
                self.take(length)?;
                self.push(Value::Bytes);
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' => {
                let members = self.pop_to_mark()?;
                self.push(Value::Tuple(members));
            }
            0x85..=0x87 => {
                let mut members = Vec::new();
                for _ in 0x84..instruction {
                    members.insert(0, self.pop()?);
                }
                self.push(Value::Tuple(members));
            }
            b'l' => {
                let members = self.pop_to_mark()?;
                self.push(Value::List(members));
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            b'q' => {
                let key = self.number(1)?;
                self.remember(key)?;
            }
            b'r' => {
                let key = self.number(4)?;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => {
                let key = self.number(1)?;
                self.recall(key)?;
            }
            b'j' => {
                let key = self.number(4)?;
                self.recall(key)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.name(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(Value::Text(module)), Some(Value::Text(name))) =
                    (self.table.get(module).cloned(), self.table.get(name).cloned())
                else {
                    return Err("a name that is no text".into());
                };
                self.name(&module, &name)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }
            b'R' => self.call()?,
            // The state of an object. torch sets the attribute `_metadata` (versions of modules) of an ordered
            // dictionary this way, and nothing else; it holds no tensors.
            b'b' => {
                self.pop()?;
                let object = self.top()?;
                if !matches!(self.table.get(object), Some(Value::Dict(_))) {
                    return Err("the state of an object that is no dictionary".into());
                }
            }
            other => {
                return Err(format!("instruction {other:#04x} at byte {}, which tensors do not take", self.at - 1));
            }
        }
        Ok(Some(None))
    }
}
