//! The hub's client against a server on this machine that answers at the hub's paths.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use lcm_lookahead::Error;
use lcm_lookahead::hub::{Hub, REPOSITORIES};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPOSITORY: &str = "owner/some-model";
const FILE: &str = "unet/model.safetensors";

/// A request as the server saw it: method, path, range, token.
#[derive(Clone, Debug, PartialEq)]
struct Request {
    method: String,
    path: String,
    range: Option<String>,
    token: Option<String>,
}

/// How the server misbehaves.
#[derive(Clone, Default)]
struct Faults {
    /// Cuts this many transfers off after half of what was asked for.
    cut: usize,
    /// Answers so many requests with 503.
    busy: usize,
    /// Sends other bytes than it announced.
    corrupt: bool,
    /// Ignores `Range`.
    no_ranges: bool,
    /// Refuses requests without this token.
    token: Option<String>,
    /// Knows the repository under another name only, to which it redirects.
    renamed: bool,
    /// Announces files as small ones, by git's checksum.
    small: bool,
    /// The commit it names.
    commit: Option<String>,
    /// Sends large files through a redirect to this origin.
    elsewhere: Option<String>,
}

struct Server {
    origin: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves large files (announced with their SHA-256) at `/owner/some-model/resolve/main/...`.
    fn start(files: HashMap<String, Vec<u8>>, faults: Faults) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let origin = format!("http://{}", listener.local_addr()?);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        // Ends with the process; nothing waits for it.
        std::thread::spawn(move || {
            let mut faults = faults;
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &files, &mut faults, &seen);
            }
        });
        Ok(Server { origin, requests })
    }

    fn one(content: &[u8], faults: Faults) -> Result<Self> {
        Self::start(HashMap::from([(FILE.to_string(), content.to_vec())]), faults)
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no thread panicked with it").clone()
    }

    fn hub(&self, home: &Path) -> Result<Hub> {
        hub(home, &[("HF_ENDPOINT", &self.origin)])
    }
}

fn hub(home: &Path, variables: &[(&str, &str)]) -> Result<Hub> {
    let lookup = |name: &str| match name {
        "HF_HOME" => Some(home.display().to_string()),
        name => variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.to_string()),
    };
    Ok(Hub::from_variables(lookup)?.with_attempts(4, Duration::from_millis(1)))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(
    stream: TcpStream,
    files: &HashMap<String, Vec<u8>>,
    faults: &mut Faults,
    seen: &Mutex<Vec<Request>>,
) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_string());
    }
    let request = Request {
        method: method.clone(),
        path: path.clone(),
        range: headers.get("range").cloned(),
        token: headers.get("authorization").cloned(),
    };
    seen.lock().expect("no thread panicked with it").push(request.clone());
    let mut stream = stream;
    let mut reply = |status: &str, headers: &str, body: &[u8]| -> Result<()> {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n")?;
        stream.write_all(body)?;
        Ok(())
    };
    if faults.busy > 0 {
        faults.busy -= 1;
        return reply("503 Service Unavailable", "Content-Length: 0\r\n", b"");
    }
    if faults.token.as_ref().is_some_and(|token| request.token.as_deref() != Some(&format!("Bearer {token}"))) {
        return reply("401 Unauthorized", "Content-Length: 0\r\n", b"");
    }
    if faults.renamed && path.starts_with(&format!("/{REPOSITORY}/")) {
        let headers = format!("Location: /owner/renamed/resolve/main/{FILE}\r\nContent-Length: 0\r\n");
        return reply("307 Temporary Redirect", &headers, b"");
    }
    let path = path.replace("/owner/renamed/", &format!("/{REPOSITORY}/"));
    let name = path.strip_prefix(&format!("/{REPOSITORY}/resolve/main/")).or_else(|| path.strip_prefix("/elsewhere/"));
    let Some(content) = name.and_then(|name| files.get(name)) else {
        return reply("404 Not Found", "Content-Length: 0\r\n", b"");
    };
    let commit = faults.commit.as_deref().unwrap_or(COMMIT);
    let about = if faults.small {
        format!("X-Repo-Commit: {commit}\r\nETag: W/\"{COMMIT}\"\r\n")
    } else {
        format!(
            "X-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{}\"\r\nX-Linked-Size: {}\r\nETag: \"another\"\r\n",
            sha256(content),
            content.len()
        )
    };
    if let Some(elsewhere) = faults.elsewhere.as_ref().filter(|_| !path.starts_with("/elsewhere/")) {
        let headers = format!("{about}Location: {elsewhere}/elsewhere/{FILE}\r\nContent-Length: 0\r\n");
        return reply("302 Found", &headers, b"");
    }
    if method == "HEAD" {
        return reply("200 OK", &format!("{about}Content-Length: {}\r\n", content.len()), b"");
    }
    let from = request.range.as_deref().filter(|_| !faults.no_ranges);
    let from = from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut body = content[from.unwrap_or(0)..].to_vec();
    if faults.corrupt {
        body[0] ^= 1;
    }
    let range = match from {
        Some(from) => format!("Content-Range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len()),
        None => String::new(),
    };
    let headers = format!("{range}Content-Length: {}\r\n", body.len());
    if faults.cut > 0 {
        faults.cut -= 1;
        body.truncate(body.len() / 2);
    }
    reply(if from.is_some() { "206 Partial Content" } else { "200 OK" }, &headers, &body)
}

fn content() -> Vec<u8> {
    (0..700_000u64).map(|i| ((i * i) >> 7) as u8).collect()
}

fn blobs(home: &Path) -> Result<Vec<PathBuf>> {
    let folder = home.join("hub/models--owner--some-model/blobs");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}

#[test]
fn a_file_is_downloaded_once_into_the_layout_that_python_shares() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    let server = Server::one(&content, Faults::default())?;
    let path = server.hub(home.path())?.file(REPOSITORY, FILE)?;
    assert_eq!(std::fs::read(&path)?, content);
    let root = home.path().join("hub/models--owner--some-model");
    assert_eq!(path, root.join("snapshots").join(COMMIT).join(FILE));
    assert_eq!(std::fs::read_to_string(root.join("refs/main"))?, COMMIT);
    assert_eq!(blobs(home.path())?, [root.join("blobs").join(sha256(&content))]);
    #[cfg(unix)]
    assert_eq!(std::fs::read_link(&path)?, PathBuf::from(format!("../../../blobs/{}", sha256(&content))));

    let asked = server.requests();
    assert_eq!(asked.iter().map(|request| request.method.as_str()).collect::<Vec<_>>(), ["HEAD", "GET"]);
    assert_eq!(server.hub(home.path())?.file(REPOSITORY, FILE)?, path);
    assert_eq!(server.requests(), asked, "the second run asked the network");
    Ok(())
}

#[test]
fn a_transfer_that_breaks_off_is_resumed_where_it_was() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    let server = Server::one(&content, Faults { cut: 2, busy: 1, ..Faults::default() })?;
    let path = server.hub(home.path())?.file(REPOSITORY, FILE)?;
    assert_eq!(std::fs::read(path)?, content);
    let ranges: Vec<_> = server.requests().into_iter().filter(|r| r.method == "GET").map(|r| r.range).collect();
    assert_eq!(ranges, [None, Some("bytes=350000-".to_string()), Some("bytes=525000-".to_string())]);
    Ok(())
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_gave_up() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    let failing = Server::one(&content, Faults { cut: 100, ..Faults::default() })?;
    let error = failing.hub(home.path())?.with_attempts(1, Duration::ZERO).file(REPOSITORY, FILE).unwrap_err();
    ensure!(matches!(error, Error::Hub { .. }) && error.to_string().contains("broke off at byte 350000"), "{error}");
    let server = Server::one(&content, Faults::default())?;
    assert_eq!(std::fs::read(server.hub(home.path())?.file(REPOSITORY, FILE)?)?, content);
    assert_eq!(server.requests()[1].range.as_deref(), Some("bytes=350000-"));
    assert_eq!(blobs(home.path())?.len(), 1, "what was left of the first run is gone");
    Ok(())
}

#[test]
fn a_server_that_ignores_ranges_sends_the_whole_again() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    let server = Server::one(&content, Faults { cut: 1, no_ranges: true, ..Faults::default() })?;
    assert_eq!(std::fs::read(server.hub(home.path())?.file(REPOSITORY, FILE)?)?, content);
    Ok(())
}

#[test]
fn redirects_of_renamed_repositories_and_small_files_are_understood() -> Result<()> {
    let content = content();
    for faults in [Faults { renamed: true, ..Faults::default() }, Faults { small: true, ..Faults::default() }] {
        let home = tempfile::tempdir()?;
        let server = Server::one(&content, faults)?;
        assert_eq!(std::fs::read(server.hub(home.path())?.file(REPOSITORY, FILE)?)?, content);
    }
    Ok(())
}

#[test]
fn a_wrong_checksum_is_refused_and_leaves_nothing_behind() -> Result<()> {
    let home = tempfile::tempdir()?;
    let server = Server::one(&content(), Faults { corrupt: true, ..Faults::default() })?;
    let error = server.hub(home.path())?.file(REPOSITORY, FILE).unwrap_err();
    let Error::Hub { repository, file, reason } = &error else { anyhow::bail!("{error}") };
    assert_eq!((repository.as_str(), file.as_str()), (REPOSITORY, FILE));
    ensure!(reason.contains("SHA-256") && reason.contains(&sha256(&content())), "{reason}");
    assert_eq!(blobs(home.path())?, Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn without_a_network_the_cache_serves_and_an_empty_one_says_what_helps() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    // A port that nothing listens on any more.
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?);
    let unreachable = hub(home.path(), &[("HF_ENDPOINT", &closed)])?;
    let offline = hub(home.path(), &[("HF_ENDPOINT", &closed), ("HF_HUB_OFFLINE", "1")])?;
    for (hub, said) in [(&unreachable, "cannot be reached"), (&offline, "HF_HUB_OFFLINE")] {
        let error = hub.file(REPOSITORY, FILE).unwrap_err();
        let text = error.to_string();
        ensure!(matches!(error, Error::Hub { .. }) && text.contains(said) && text.contains("--weights"), "{text}");
    }
    let path = Server::one(&content, Faults::default())?.hub(home.path())?.file(REPOSITORY, FILE)?;
    for hub in [unreachable, offline] {
        assert_eq!(hub.file(REPOSITORY, FILE)?, path);
    }
    Ok(())
}

#[test]
fn offline_no_request_is_made_at_all() -> Result<()> {
    let home = tempfile::tempdir()?;
    let server = Server::one(&content(), Faults::default())?;
    let hub = hub(home.path(), &[("HF_ENDPOINT", &server.origin), ("HF_HUB_OFFLINE", "true")])?;
    ensure!(hub.file(REPOSITORY, FILE).is_err());
    assert_eq!(server.requests(), []);
    Ok(())
}

#[test]
fn a_folder_of_weights_comes_before_cache_and_network() -> Result<()> {
    let (home, folder) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let hub = hub(home.path(), &[("HF_HUB_OFFLINE", "1")])?.with_weights_folder(Some(folder.path().into()));
    let error = hub.file(REPOSITORY, FILE).unwrap_err().to_string();
    ensure!(error.contains(&folder.path().join(REPOSITORY).join(FILE).display().to_string()), "{error}");
    for place in ["some-model", "owner/some-model"] {
        let path = folder.path().join(place).join(FILE);
        std::fs::create_dir_all(path.parent().expect("it has one"))?;
        std::fs::write(&path, b"x")?;
        assert_eq!(hub.file(REPOSITORY, FILE)?, path);
        assert_eq!(hub.folder(REPOSITORY, &[FILE])?, folder.path().join(place));
    }
    Ok(())
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() -> Result<()> {
    let (home, content) = (tempfile::tempdir()?, content());
    let store = Server::one(&content, Faults::default())?;
    let faults = Faults { token: Some("secret".into()), elsewhere: Some(store.origin.clone()), ..Faults::default() };
    let server = Server::one(&content, faults)?;
    let error = server.hub(home.path())?.file(REPOSITORY, FILE).unwrap_err().to_string();
    ensure!(error.contains("HF_TOKEN") && error.contains("401"), "{error}");
    let hub = hub(home.path(), &[("HF_ENDPOINT", &server.origin), ("HF_TOKEN", "secret")])?;
    ensure!(!format!("{hub:?}").contains("secret"));
    assert_eq!(std::fs::read(hub.file(REPOSITORY, FILE)?)?, content);
    let there = store.requests();
    assert_eq!(there.len(), 1);
    assert_eq!((there[0].method.as_str(), &there[0].token), ("GET", &None));
    Ok(())
}

#[test]
fn a_token_that_was_saved_by_a_login_is_used() -> Result<()> {
    let home = tempfile::tempdir()?;
    std::fs::write(home.path().join("token"), "saved\n")?;
    let server = Server::one(&content(), Faults { token: Some("saved".into()), ..Faults::default() })?;
    server.hub(home.path())?.file(REPOSITORY, FILE)?;
    Ok(())
}

#[test]
fn missing_files_and_names_that_leave_the_cache_are_refused() -> Result<()> {
    let home = tempfile::tempdir()?;
    let server = Server::one(&content(), Faults::default())?;
    let error = server.hub(home.path())?.file(REPOSITORY, "other.bin").unwrap_err().to_string();
    ensure!(error.contains("`other.bin`") && error.contains("404"), "{error}");
    let asked = server.requests().len();
    for (repository, file) in [(REPOSITORY, "../../x"), ("../x", "x"), ("a/b/c", "x"), (REPOSITORY, ""), ("a", "x")] {
        ensure!(server.hub(home.path())?.file(repository, file).is_err(), "{repository} {file}");
    }
    assert_eq!(server.requests().len(), asked);
    let evil = Server::one(&content(), Faults { commit: Some("../../../x".into()), ..Faults::default() })?;
    let error = evil.hub(home.path())?.file(REPOSITORY, FILE).unwrap_err().to_string();
    ensure!(error.contains("does not answer as a hub"), "{error}");
    Ok(())
}

#[test]
fn every_repository_says_licence_purpose_and_sizes() {
    for repository in REPOSITORIES {
        assert!(!repository.licence.is_empty() && !repository.purpose.is_empty(), "{}", repository.id);
        assert!(repository.files.iter().all(|file| file.bytes > 0), "{}", repository.id);
        assert_eq!(repository.id.split('/').count(), 2);
    }
}
