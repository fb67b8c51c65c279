//! `forkling network`: shows and changes what a fork may reach; and the options of forks to be made.

use std::{net::Ipv4Addr, process::ExitCode};

use super::{
    client::{Client, Failure, segment},
    output::Output,
};
use crate::api::types::{ForkNetworkInfo, ForkNetworkRequest, NetworkDenial, SetForkNetwork};

/// What a fork may reach.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Egress {
    /// Rules of what it may reach.
    #[arg(
        long,
        value_name = "RULE",
        help = "What it may reach, may be given more than once: [tcp://|udp://|icmp://]DESTINATION[:PORTS], where \
                DESTINATION is an address, a CIDR, a domain name, *.DOMAIN, `host` or `internet`"
    )]
    allow: Vec<String>,
    /// It may reach nothing, whatever its template allows
    #[arg(long, conflicts_with = "allow")]
    deny_all: bool,
}

impl Egress {
    /// The rules, if anything was said.
    fn rules(self) -> Option<Vec<String>> {
        (self.deny_all || !self.allow.is_empty()).then_some(self.allow)
    }
}

/// The network of forks to be made.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    #[command(flatten)]
    egress: Egress,
    /// Group whose forks reach each other by address and name
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Address of a single fork
    #[arg(long, value_name = "ADDRESS")]
    ipv4: Option<Ipv4Addr>,
}

impl Options {
    /// What to ask for, if anything was said.
    pub fn request(self) -> Option<ForkNetworkRequest> {
        let request = ForkNetworkRequest {
            egress: self.egress.rules(),
            group: self.group,
            ipv4: self.ipv4,
            limits: None,
        };
        (request != ForkNetworkRequest::default()).then_some(request)
    }
}

/// The network of a fork.
#[derive(Debug, clap::Args)]
pub struct Network {
    /// Its id or name
    fork: String,
    #[command(flatten)]
    egress: Egress,
}

impl Network {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}/network", segment(&self.fork));
        let info: ForkNetworkInfo = match self.egress.rules() {
            Some(egress) => client.put(&path, &SetForkNetwork { egress }).await?,
            None => client.get(&path).await?,
        };
        if output.json {
            output.print(&info);
        } else {
            lines(&info).iter().for_each(|(name, value)| println!("{name:<10}{value}"));
            info.denials.iter().for_each(|denial| println!("{:<10}{}", "denied", describe(denial)));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn lines(info: &ForkNetworkInfo) -> Vec<(&'static str, String)> {
    let (network, counters) = (&info.network, &info.counters);
    let egress = if network.egress.is_empty() { "nothing".to_owned() } else { network.egress.join(" ") };
    vec![
        ("address", format!("{} {} {}", network.ipv4, network.ipv6, network.mac)),
        ("group", network.group.clone().unwrap_or_else(|| "none".to_owned())),
        ("may reach", egress),
        ("sent", format!("{} frames, {} bytes", counters.frames_from_guest, counters.bytes_from_guest)),
        ("received", format!("{} frames, {} bytes", counters.frames_to_guest, counters.bytes_to_guest)),
        ("flows", format!("{} open, {} opened", counters.flows, counters.flows_opened)),
        ("refused", format!("{} denied, {} over a limit", counters.denied, counters.limited)),
    ]
}

fn describe(denial: &NetworkDenial) -> String {
    let port = denial.port.map(|port| format!(" port {port}")).unwrap_or_default();
    let address = denial.address.map(|address| format!(" {address}")).unwrap_or_default();
    let name = denial.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
    format!("{}{name}{address}{port}", denial.what)
}
