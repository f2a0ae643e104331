//! The process of one of the two machines, as the comparing process sees it.

use crate::guest::{receive, send};
use crate::protocol::{Answer, Ask, Status};
use crate::{Run, guest::Plant};
use anyhow::{Context, Result, bail};
use std::io::BufReader;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub(crate) struct Side {
    pub name: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Side {
    fn start(name: &str, accel: &str, plant: Option<Plant>, run: &Run) -> Result<Side> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--serve", accel]);
        if let Some(plant) = plant {
            command.args(["--plant", &format!("{},{}", plant.count, plant.register)]);
        }
        command.arg("--").args(&run.machine).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("a machine's process can't be started")?;
        let (to, from) = child.stdin.take().zip(child.stdout.take()).context("a process without pipes")?;
        Ok(Side { name: name.into(), child, to, from: BufReader::new(from) })
    }

    pub(crate) fn send(&mut self, ask: &Ask) -> Result<()> {
        send(&mut self.to, ask).with_context(|| format!("{}: its machine's process ended", self.name))
    }

    pub(crate) fn receive(&mut self) -> Result<Answer> {
        match receive(&mut self.from)? {
            Some(Answer::Failed(text)) => bail!("{}: {text}", self.name),
            Some(answer) => Ok(answer),
            None => bail!("{}: its machine's process ended", self.name),
        }
    }

    pub(crate) fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.send(ask)?;
        self.receive()
    }

    pub(crate) fn status(&mut self) -> Result<Status> {
        match self.receive()? {
            Answer::Status(status) => Ok(status),
            other => bail!("{}: an answer that was not asked for: {other:?}", self.name),
        }
    }
}

/// Both machines.
pub(crate) struct Pair(pub [Side; 2]);

impl Pair {
    pub(crate) fn start(run: &Run) -> Result<Pair> {
        let names =
            if run.left == run.right { ["first", "second"] } else { [run.left.as_str(), run.right.as_str()] };
        Ok(Pair([
            Side::start(names[0], &run.left, None, run)?,
            Side::start(names[1], &run.right, run.plant, run)?,
        ]))
    }

    /// Has both do the same at the same time.
    pub(crate) fn both(&mut self, ask: &Ask) -> Result<[Status; 2]> {
        for side in &mut self.0 {
            side.send(ask)?;
        }
        let [left, right] = &mut self.0;
        let left = left.status();
        Ok([left?, right.status()?])
    }
}
