//! What the host may ask for: one function per kind of frame.

use forkling_proto::rpc::{CallError, Exec, Header, Kind};
use rustix::event::epoll::{self, EventFlags};

use super::call::Call;
use super::{Error, MAX_CALLS, STDIN, Server, token, watch_outputs};
use crate::command;
use crate::failure::chain;

impl Server {
    pub(super) fn handle(&mut self, id: u32, header: Header, payload: Vec<u8>) -> Result<(), Error> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let number = header.call;
        let running = connection.calls.get(&number).copied();
        match header.kind {
            Kind::Stdin => running.map_or((), |call| self.feed(call, payload)),
            Kind::Signal => running.map_or((), |call| self.signal(call, &payload)),
            // A second call with the number of a running one: no answer could tell them apart.
            _ if running.is_some() => self.drop_connection(id),
            Kind::Ping => connection.send(number, Kind::Pong, &payload),
            Kind::Exec => self.exec(id, number, &payload),
            Kind::Freeze => self.freeze(id, number)?,
            other => {
                self.refuse(id, number, &CallError::BadRequest(format!("{other:?} is not for the agent")))
            }
        }
        Ok(())
    }

    fn exec(&mut self, id: u32, number: u32, payload: &[u8]) {
        let started = match postcard::from_bytes::<Exec>(payload) {
            Err(_) => Err(CallError::BadRequest("the payload of exec is malformed".to_owned())),
            Ok(_) if self.calls.len() >= MAX_CALLS => {
                Err(CallError::System(format!("{MAX_CALLS} commands are running, the most at a time")))
            }
            Ok(exec) => Call::start(id, number, &exec, &self.environment).map_err(call_error),
        };
        let mut call = match started {
            Ok(call) => call,
            Err(error) => return self.refuse(id, number, &error),
        };
        self.reaper.watch(call.pid);
        let call_id = self.new_id();
        let connection = self.connections.get_mut(&id).expect("the request came from it");
        connection.calls.insert(number, call_id);
        let pid = call.pid.as_raw_pid();
        let encoded = postcard::to_allocvec(&(pid as u32)).expect("a number can be encoded");
        connection.send(number, Kind::Started, &encoded);
        if !connection.paused {
            watch_outputs(&self.epoll, call_id, &mut call, true);
        }
        self.by_pid.insert(pid, call_id);
        self.calls.insert(call_id, call);
    }

    fn feed(&mut self, call_id: u32, bytes: Vec<u8>) {
        let Some(call) = self.calls.get_mut(&call_id) else { return };
        let watched = call.has_input();
        call.feed(bytes);
        if let Some(stdin) = call.stdin.as_ref().filter(|_| call.has_input() && !watched) {
            // Without the event the input would wait for the next frame; the call's deadline still holds.
            let _ = epoll::add(&self.epoll, stdin, token(call_id, STDIN), EventFlags::OUT);
        }
        let stuffed = call.is_stuffed();
        if let Some(connection) = self.connections.get_mut(&call.connection) {
            connection.stalled |= stuffed;
        }
    }

    fn signal(&mut self, call_id: u32, payload: &[u8]) {
        let Some(call) = self.calls.get(&call_id) else { return };
        let sent = match payload {
            &[signal] if signal > 0 => {
                call.signal(signal).map_err(|error| format!("signal {signal}: {error}"))
            }
            _ => Err("a signal is one byte, and not 0".to_owned()),
        };
        if let Err(text) = sent {
            let (id, number) = (call.connection, call.number);
            call.kill();
            self.remove_call(call_id);
            self.refuse(id, number, &CallError::BadRequest(text));
        }
    }

    fn freeze(&mut self, id: u32, number: u32) -> Result<(), Error> {
        let Some(forkpoint) = &mut self.forkpoint else {
            let text = "this agent is not PID 1 of a guest and has no forkpoint".to_owned();
            self.refuse(id, number, &CallError::System(text));
            return Ok(());
        };
        match forkpoint.prepare() {
            Ok(prepared) => {
                forkpoint.pass(prepared, &mut self.reaper, &mut self.environment);
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.send(number, Kind::Pong, &[]);
                }
            }
            Err(error) => self.refuse(id, number, &CallError::System(chain(&error))),
        }
        Ok(())
    }

    fn refuse(&mut self, id: u32, number: u32, error: &CallError) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let encoded = postcard::to_allocvec(error).expect("an error can be encoded");
            connection.send(number, Kind::Error, &encoded);
        }
    }
}

fn call_error(error: command::Error) -> CallError {
    match error {
        command::Error::NotFound(name) => CallError::NotFound(name),
        command::Error::NoSuchDirectory(path) => CallError::NoSuchDirectory(path),
        command::Error::NoSuchUser(name) => CallError::NoSuchUser(name),
        command::Error::Invalid(text) => CallError::BadRequest(text.to_owned()),
        error @ command::Error::System { .. } => CallError::System(chain(&error)),
    }
}
