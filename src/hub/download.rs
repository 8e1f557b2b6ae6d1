//! Getting a file from the hub.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Agent, Body};

use super::Hub;
use super::cache::Cache;
use crate::Error;

/// A connection that is silent for so long is broken.
const SILENCE: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 10;

/// Why a file could not be had.
pub(super) enum Failure {
    /// The hub could not be reached, or kept breaking off.
    Unreachable(String),
    /// The hub said no, or what it sent is not what it announced.
    Refused(String),
    /// Something on this machine.
    Local(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Local(error)
    }
}

type Result<T> = std::result::Result<T, Failure>;

/// What the hub says of a file before it is fetched.
struct About {
    commit: String,
    etag: String,
    size: u64,
}

/// Gets a file into the cache.
pub(super) fn fetch(hub: &Hub, cache: &Cache, repository: &str, revision: &str, file: &str) -> Result<PathBuf> {
    let client = Client::new(hub);
    let escaped = file.replace('+', "%2B").replace(' ', "%20");
    let address = format!("{}/{repository}/resolve/{}/{escaped}", hub.endpoint, revision.replace('/', "%2F"));
    let about = client.retry(|| client.about(&address, repository))?;
    let blob = cache.blob(&about.etag)?;
    if !blob.is_file() {
        let partial = blob.with_file_name(format!("{}.incomplete", about.etag));
        let name = file.rsplit('/').next().unwrap_or(file);
        let bar = progress(name, about.size);
        client.retry(|| client.transfer(&address, &about, &partial, &bar))?;
        bar.finish_and_clear();
        std::fs::rename(&partial, &blob).map_err(Error::io("rename to its final name", &partial))?;
    }
    Ok(cache.put(revision, &about.commit, file, &about.etag)?)
}

fn progress(name: &str, size: u64) -> ProgressBar {
    let bar = ProgressBar::new(size).with_message(name.to_string());
    let form = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    // The form is a constant; should it not be one that indicatif reads, its own is as good.
    bar.set_style(ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

/// Scheme and host of an address.
fn origin(address: &str) -> &str {
    let host = address.find("://").map_or(0, |at| at + 3);
    address[host..].find('/').map_or(address, |end| &address[..host + end])
}

fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

fn is_hex(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl<'a> Client<'a> {
    fn new(hub: &'a Hub) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed by hand, for the token must not go along to another host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("lcm-lookahead/", env!("CARGO_PKG_VERSION")));
        Client { hub, agent: config.build().new_agent() }
    }

    /// Tries again where the network, not the hub's answer, is at fault.
    fn retry<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let mut pause = self.hub.pause;
        for _ in 1..self.hub.attempts {
            match attempt() {
                Err(Failure::Unreachable(reason)) => {
                    tracing::debug!("trying again: {reason}");
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                other => return other,
            }
        }
        attempt()
    }

    fn send(&self, head: bool, address: &str, from: u64) -> Result<Response<Body>> {
        let mut request = if head { self.agent.head(address) } else { self.agent.get(address) };
        // Compressed, the bytes of a range would not be those of the file.
        request = request.header("Accept-Encoding", "identity");
        if let Some(token) = self.hub.token.as_ref().filter(|_| origin(address) == origin(&self.hub.endpoint)) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let host = origin(address);
        request.call().map_err(|error| Failure::Unreachable(format!("{host} cannot be reached: {error}")))
    }

    /// Where a redirect leads, as a whole address.
    fn redirected(&self, from: &str, response: &Response<Body>) -> Result<Option<String>> {
        if !response.status().is_redirection() || response.status() == 304 {
            return Ok(None);
        }
        let refused = || Failure::Refused(format!("{}: a redirect to nowhere", origin(from)));
        let place = header(response, "location").ok_or_else(refused)?;
        let target = match place {
            relative if relative.starts_with('/') && !relative.starts_with("//") => format!("{}{place}", origin(from)),
            whole if whole.starts_with("https://") => whole.to_string(),
            whole if whole.starts_with("http://") && from.starts_with("http://") => whole.to_string(),
            _ => return Err(refused()),
        };
        Ok(Some(target))
    }

    /// The answer's status as an error, where it is one.
    fn check(&self, response: &Response<Body>, repository: &str) -> Result<()> {
        let status = response.status().as_u16();
        let endpoint = &self.hub.endpoint;
        Err(match status {
            200..=399 => return Ok(()),
            401 | 403 => Failure::Refused(format!(
                "{endpoint} refuses access ({status}); accept its terms at {endpoint}/{repository} where it has any, \
                 and set HF_TOKEN to a token that may read it"
            )),
            404 => Failure::Refused(format!("{endpoint} has no such file, revision or repository (404)")),
            429 | 500..=599 => Failure::Unreachable(format!("{endpoint} answers {status}")),
            other => Failure::Refused(format!("{endpoint} answers {other}")),
        })
    }

    /// Asks for commit, checksum and size. What the hub stores elsewhere it announces in headers of its own, on the
    /// redirect that leads there.
    fn about(&self, address: &str, repository: &str) -> Result<About> {
        let mut address = address.to_string();
        for _ in 0..MOST_REDIRECTS {
            let response = self.send(true, &address, 0)?;
            self.check(&response, repository)?;
            if let Some(target) = self.redirected(&address, &response)?
                && header(&response, "x-linked-etag").is_none()
                && origin(&target) == origin(&address)
            {
                address = target;
                continue;
            }
            let clean = |etag: &str| etag.trim_start_matches("W/").trim_matches('"').to_lowercase();
            let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag")).map(clean);
            let size = header(&response, "x-linked-size").or_else(|| header(&response, "content-length"));
            let commit = header(&response, "x-repo-commit").filter(|commit| is_hex(commit, &[40]));
            // Names of files are made of these, so they are what they should be or nothing.
            let etag = etag.filter(|etag| is_hex(etag, &[40, 64]));
            return match (commit, etag, size.and_then(|size| size.parse().ok())) {
                (Some(commit), Some(etag), Some(size)) => Ok(About { commit: commit.to_string(), etag, size }),
                _ => Err(Failure::Refused(format!(
                    "{} does not answer as a hub does: commit, checksum or size is missing",
                    self.hub.endpoint
                ))),
            };
        }
        Err(Failure::Refused(format!("{} redirects without end", self.hub.endpoint)))
    }

    /// Gets the bytes that are still missing, and checks the whole.
    fn transfer(&self, address: &str, about: &About, partial: &Path, bar: &ProgressBar) -> Result<()> {
        let mut hasher = Sha256::new();
        let mut here = hash_file(partial, &mut hasher)?;
        if here > about.size {
            (here, hasher) = (0, Sha256::new());
        }
        if here < about.size || about.size == 0 {
            let mut response = self.follow(address, here)?;
            if !continues(&response, here) {
                (here, hasher) = (0, Sha256::new());
            }
            let mut file = OpenOptions::new()
                .create(true)
                .append(here > 0)
                .write(true)
                .truncate(here == 0)
                .open(partial)
                .map_err(Error::io("create the file", partial))?;
            bar.set_position(here);
            bar.reset_eta();
            let mut body = response.body_mut().as_reader();
            let mut buffer = vec![0; 1 << 18];
            while here < about.size {
                let broken = |why: String| {
                    Failure::Unreachable(format!("the transfer broke off at byte {here} of {}: {why}", about.size))
                };
                let count = match body.read(&mut buffer) {
                    Ok(0) => return Err(broken("the connection was closed".into())),
                    Ok(count) => count,
                    Err(error) => return Err(broken(error.to_string())),
                };
                file.write_all(&buffer[..count]).map_err(Error::io("write", partial))?;
                hasher.update(&buffer[..count]);
                here += count as u64;
                bar.set_position(here);
            }
            file.sync_all().map_err(Error::io("write to disk", partial))?;
        }
        let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        // Small files are announced with a checksum of git's, over another form of them; their size was checked.
        if here != about.size || (about.etag.len() == 64 && found != about.etag) {
            let _ = std::fs::remove_file(partial);
            return Err(Failure::Refused(format!(
                "what arrived is not what the hub announced: expected {} bytes with SHA-256 {}, found {here} bytes \
                 with {found}; it was removed",
                about.size, about.etag
            )));
        }
        Ok(())
    }

    /// Sends the request for the bytes, to wherever they lie.
    fn follow(&self, address: &str, from: u64) -> Result<Response<Body>> {
        let mut address = address.to_string();
        for _ in 0..MOST_REDIRECTS {
            let response = self.send(false, &address, from)?;
            if let Some(target) = self.redirected(&address, &response)? {
                address = target;
                continue;
            }
            // The range lies behind the end: begin anew.
            if response.status() == 416 && from > 0 {
                return self.send(false, &address, 0);
            }
            self.check(&response, "")?;
            return Ok(response);
        }
        Err(Failure::Refused(format!("{} redirects without end", self.hub.endpoint)))
    }
}

/// Whether an answer begins at the byte that was asked for.
fn continues(response: &Response<Body>, from: u64) -> bool {
    let range = header(response, "content-range").and_then(|range| range.strip_prefix("bytes "));
    let start = range.and_then(|range| range.split('-').next()?.trim().parse::<u64>().ok());
    response.status() == 206 && start == Some(from)
}

/// Feeds a file to the hasher; 0 bytes where there is none.
fn hash_file(path: &Path, hasher: &mut Sha256) -> Result<u64> {
    let Ok(mut file) = File::open(path) else { return Ok(0) };
    let (mut buffer, mut length) = (vec![0; 1 << 18], 0);
    loop {
        match file.read(&mut buffer).map_err(Error::io("read", path))? {
            0 => return Ok(length),
            count => {
                hasher.update(&buffer[..count]);
                length += count as u64;
            }
        }
    }
}
