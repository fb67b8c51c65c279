//! The builder process of one template, as the daemon holds it.

use std::os::fd::BorrowedFd;

use forkling_vmm::protocol::{BuildSpec, Failure, FailureKind, FromBuilder, ToBuilder};
use tokio::sync::mpsc;

use crate::{
    api::{
        error::{Code, Error, chain},
        types::BuildEvent,
    },
    control,
    engine::Engine,
    process::Doomed,
};

/// Boots and saves. Cancelled, the process is killed. `fds` are those of [`ToBuilder::Build`].
pub async fn run(
    engine: &Engine,
    spec: BuildSpec,
    fds: &[BorrowedFd<'_>],
    events: &mpsc::Sender<BuildEvent>,
) -> Result<(), Error> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(Code::BuildFailed, "the builder process failed").because(cause)
    };
    let (socket, theirs) = control::pair().map_err(|error| failed(&error))?;
    let process = engine.spawner.spawn("build", theirs).await.map_err(|error| failed(&error))?;
    let mut process = Doomed::new(process);
    socket.send(&ToBuilder::Build(spec), fds).await.map_err(|error| failed(&chain(&error)))?;
    let mut outcome = None;
    loop {
        match socket.receive::<FromBuilder>().await {
            Ok(Some((FromBuilder::Done, _))) => outcome = Some(Ok(())),
            Ok(Some((FromBuilder::Failed(failure), _))) => outcome = Some(Err(of_failure(&failure))),
            Ok(Some((FromBuilder::Stage(stage), _))) => {
                let _ = events.send(BuildEvent::Stage { stage }).await;
            }
            // Console and progress are dropped when the reader is slow.
            Ok(Some((FromBuilder::Console(bytes), _))) => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let _ = events.try_send(BuildEvent::Console { text });
            }
            Ok(Some((FromBuilder::Saving { done, total }, _))) => {
                let _ = events.try_send(BuildEvent::Save { done, total });
            }
            Ok(None) => break,
            Err(error) => {
                outcome = outcome.or_else(|| Some(Err(failed(&chain(&error)))));
                break;
            }
        }
    }
    let exit = process.wait().await.map_err(|error| failed(&error))?;
    outcome.unwrap_or_else(|| Err(failed(&format_args!("it {exit} without a word"))))
}

fn of_failure(failure: &Failure) -> Error {
    let (code, message) = match failure.kind {
        FailureKind::Request => (Code::BuildRefused, "the template cannot be built from this"),
        FailureKind::Guest => (Code::BuildGuestFailed, "the guest did not reach its ready condition"),
        FailureKind::Snapshot | FailureKind::Host => {
            (Code::BuildFailed, "the host could not build the template")
        }
    };
    Error::new(code, message).because(&failure.message)
}
