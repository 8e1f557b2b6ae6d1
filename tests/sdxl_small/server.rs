//! A server on this machine that answers at the hub's paths. Its faults are tested in `tests/hub.rs`; this one has none.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use sha2::{Digest, Sha256};

pub struct Server {
    pub origin: String,
    downloads: Arc<AtomicUsize>,
}

impl Server {
    /// Serves files, by `owner/name/path`, at `/owner/name/resolve/main/path`.
    pub fn start(files: HashMap<String, Vec<u8>>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let origin = format!("http://{}", listener.local_addr()?);
        let downloads = Arc::new(AtomicUsize::new(0));
        let counted = downloads.clone();
        // Ends with the process; nothing waits for it.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &files, &counted);
            }
        });
        Ok(Server { origin, downloads })
    }

    /// How many files were sent.
    pub fn downloads(&self) -> usize {
        self.downloads.load(Ordering::Relaxed)
    }
}

fn answer(mut stream: TcpStream, files: &HashMap<String, Vec<u8>>, downloads: &AtomicUsize) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let Some(content) = files.get(&path.trim_start_matches('/').replacen("/resolve/main/", "/", 1)) else {
        return Ok(write!(stream, "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")?);
    };
    let etag: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    let size = content.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nX-Repo-Commit: {:040}\r\nX-Linked-Etag: \"{etag}\"\r\n\
         X-Linked-Size: {size}\r\nContent-Length: {size}\r\n\r\n",
        1
    )?;
    if method == "GET" {
        downloads.fetch_add(1, Ordering::Relaxed);
        stream.write_all(content)?;
    }
    Ok(())
}
