//! What nftables counted for a tap.

use forkling_net::control::Counters;
use serde_json::{Deserializer, Value};

/// Adds up the counters of the chains that nft listed as JSON, one document after the other, by their comments.
pub fn parse(listed: &str, flows: usize) -> Result<Counters, serde_json::Error> {
    let mut counters = Counters { flows: flows as u64, ..Counters::default() };
    for document in Deserializer::from_str(listed).into_iter::<Value>() {
        let document = document?;
        for entry in document["nftables"].as_array().into_iter().flatten() {
            let rule = &entry["rule"];
            let expressions = rule["expr"].as_array().into_iter().flatten();
            for counter in expressions.map(|expression| &expression["counter"]) {
                let number = |field: &str| counter[field].as_u64().unwrap_or(0);
                add(
                    &mut counters,
                    rule["comment"].as_str().unwrap_or_default(),
                    number("packets"),
                    number("bytes"),
                );
            }
        }
    }
    Ok(counters)
}

fn add(counters: &mut Counters, what: &str, packets: u64, bytes: u64) {
    match what {
        "sent" => {
            counters.frames_from_guest += packets;
            counters.bytes_from_guest += bytes;
        }
        "received" => {
            counters.frames_to_guest += packets;
            counters.bytes_to_guest += bytes;
        }
        "refused" => counters.frames_refused += packets,
        "dropped" => counters.frames_dropped += packets,
        "denied" => counters.denied += packets,
        "limited" => counters.limited += packets,
        "opened" => counters.flows_opened += packets,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
