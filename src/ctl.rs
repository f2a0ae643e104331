//! `hyaline ctl`: one command for a running machine, by its control socket.

use crate::{complain, print};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const HELP: &str = "\
usage: hyaline ctl SOCKET COMMAND…

Has a running machine, which was started with -control unix:SOCKET, carry out one command while it runs, and prints the answer:
  help                      all monitor commands: info mtree -f, reg NAME, why-no-irq N, trace on SPEC, last reg NAME …
  map [--json]              its map as it is now
  map why io:0xc012         why that address goes where it goes
  report                    writes a crash report; the guest goes on
  quit                      ends it
Examples: hyaline ctl s reg com1.lsr
          hyaline ctl s trace on reg:serial0.LCR,file=/tmp/lcr
";

/// A connection to a machine.
pub(crate) struct Client {
    reader: BufReader<UnixStream>,
    who: &'static str,
}

impl Client {
    /// Connects; `who` begins its complaints.
    pub(crate) fn connect(who: &'static str, path: &str) -> Result<Client, String> {
        let path = path.strip_prefix("unix:").unwrap_or(path);
        let stream = UnixStream::connect(path)
            .map_err(|e| format!("{who}: {path}: {e}; was the machine started with -control unix:{path}?"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|e| format!("{who}: {e}"))?;
        Ok(Client { reader: BufReader::new(stream), who })
    }

    /// Asks; an answer that is an error is one.
    pub(crate) fn ask(&mut self, ask: &Value) -> Result<Value, String> {
        let who = self.who;
        let gone = |e: std::io::Error| format!("{who}: the machine does not answer any more: {e}");
        writeln!(self.reader.get_mut(), "{ask}").map_err(gone)?;
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(gone)?;
        if line.is_empty() {
            return Err(format!("{who}: the machine has ended"));
        }
        let answer: Value =
            serde_json::from_str(&line).map_err(|e| format!("{who}: the answer is no JSON: {e}"))?;
        match answer["error"].as_str() {
            Some(e) => Err(format!("{who}: {e}")),
            None => Ok(answer),
        }
    }
}

/// `hyaline ctl …`.
pub(crate) fn command(args: Vec<OsString>) -> i32 {
    let words: Vec<String> = args.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (socket, what) = match words.as_slice() {
        ["--help" | "-help" | "-h", ..] => {
            print(HELP);
            return 0;
        }
        [socket, what @ ..] if !what.is_empty() => (*socket, what),
        _ => {
            print(HELP);
            return 1;
        }
    };
    let asked = match what {
        ["map"] => json!({"ask": "monitor", "line": "info mtree"}),
        ["map", "--json"] => json!({"ask": "map"}),
        ["map", "why", place] => json!({"ask": "map", "why": place}),
        ["report"] => json!({"ask": "report"}),
        ["quit"] => json!({"ask": "quit"}),
        words => json!({"ask": "monitor", "line": words.join(" ")}),
    };
    let mut client = match Client::connect("ctl", socket) {
        Ok(c) => c,
        Err(e) => return complain(&e),
    };
    let mut done = client.ask(&asked);
    if let (["map"], Ok(first)) = (what, &done) {
        let tree = first["text"].as_str().unwrap_or("").to_string();
        done = client
            .ask(&json!({"ask": "monitor", "line": "info mtree -f"}))
            .map(|flat| json!({"text": tree + flat["text"].as_str().unwrap_or("")}));
    }
    match done {
        Ok(answer) => {
            let text = match (answer["text"].as_str(), answer["ok"].as_str()) {
                (Some(t), _) => t.to_string(),
                (None, Some(ok)) => format!("{ok}\n"),
                _ => format!("{:#}\n", answer["map"]),
            };
            print(&text);
            0
        }
        Err(e) => complain(&e),
    }
}
