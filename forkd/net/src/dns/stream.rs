//! Queries over TCP: each behind its length in two bytes (RFC 1035, 4.2.2).

use smoltcp::socket::tcp::Socket;

/// Longest query taken, in bytes.
const QUERY: usize = 512;

/// Queries of one connection that are asked at a time.
const ASKED: usize = 16;

/// One connection's queries and answers.
#[derive(Debug, Default)]
pub struct Stream {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    asked: usize,
}

impl Stream {
    /// Between the rings of the stack and here. A query that is too long is answered by a reset.
    pub fn move_bytes(&mut self, socket: &mut Socket<'_>) {
        if self.asked < ASKED && self.incoming.len() < 2 + QUERY {
            let room = 2 + QUERY - self.incoming.len();
            // Nothing can be read of a connection that is closed.
            let _ = socket.recv(|ring| {
                let taken = &ring[..ring.len().min(room)];
                self.incoming.extend_from_slice(taken);
                (taken.len(), ())
            });
        }
        if self.length().is_some_and(|length| length > QUERY) {
            socket.abort();
            return;
        }
        if !self.outgoing.is_empty() && socket.can_send() {
            let sent = socket.send_slice(&self.outgoing).unwrap_or(0);
            self.outgoing.drain(..sent);
        }
    }

    fn length(&self) -> Option<usize> {
        let length = self.incoming.first_chunk::<2>()?;
        Some(usize::from(u16::from_be_bytes(*length)))
    }

    /// The next query, if it is complete. It is owed an answer.
    pub fn query(&mut self) -> Option<Vec<u8>> {
        let length = self.length()?;
        if self.asked >= ASKED || self.incoming.len() < 2 + length {
            return None;
        }
        let query = self.incoming[2..2 + length].to_vec();
        self.incoming.drain(..2 + length);
        self.asked += 1;
        Some(query)
    }

    /// The answer to a query; `None` if it is not answered.
    pub fn answer(&mut self, answer: Option<&[u8]>) {
        self.asked = self.asked.saturating_sub(1);
        let Some(answer) = answer else { return };
        let Ok(length) = u16::try_from(answer.len()) else { return };
        self.outgoing.extend_from_slice(&length.to_be_bytes());
        self.outgoing.extend_from_slice(answer);
    }

    /// Whether no answer is owed, nor will be for what has come.
    pub fn is_idle(&self) -> bool {
        let complete = self.length().is_some_and(|length| self.incoming.len() >= 2 + length);
        self.asked == 0 && self.outgoing.is_empty() && !complete
    }
}
