//! Networks of forks: what is asked for with them, and verbs on them.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    extract::{Body, Name, Params},
    forks::running,
    types::{CreateForks, ForkNetworkInfo, ForkNetworkRequest, SetForkNetwork},
};
use crate::{
    engine::Engine,
    fork::{Attached, NetworkChoice, not_had, policy, supported},
    names,
    template::Template,
};

/// Checks the network that a request for `count` forks asks for.
pub fn network_choice(
    engine: &Engine,
    request: &CreateForks,
    template: &Template,
    count: u32,
) -> Result<NetworkChoice, Error> {
    let spec = &template.record.spec;
    if !spec.has_nic() {
        return match request.network {
            None => Ok(NetworkChoice::default()),
            Some(_) => {
                Err(Error::new(Code::NoNetwork, format!("forks of template {} have no NIC", spec.name)))
            }
        };
    }
    let ForkNetworkRequest { egress, group, ipv4, limits } = request.network.clone().unwrap_or_default();
    if let Some(group) = &group {
        names::validate(group).map_err(|error| {
            Error::new(Code::InvalidName, format!("{group:?} is not a valid name for a group")).because(error)
        })?;
    }
    if let Some(ipv4) = ipv4 {
        if count != 1 {
            let message = format!("{count} forks cannot all have the address {ipv4}");
            return Err(Error::new(Code::InvalidAddress, message));
        }
        engine.network.addresses().check(ipv4).map_err(|error| not_had(&error))?;
    }
    let egress = egress.unwrap_or_else(|| spec.network.egress.clone());
    let policy = policy(&egress)?;
    supported(engine, &policy)?;
    Ok(NetworkChoice { egress, policy, group, ipv4, limits: limits.unwrap_or_default() })
}

/// Which denials are wanted.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Inspect {
    /// Those with this number and later ones; all that are kept if not given.
    #[serde(default)]
    pub denials_from: u64,
}

/// The network of a fork: its addresses and rules, what it carried, what it was denied.
#[utoipa::path(
    get, path = "/v1/forks/{id}/network", tag = "forks",
    params(("id" = String, Path, description = "id or name"), Inspect),
    responses((status = 200, body = ForkNetworkInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn inspect(
    State(shared): State<Shared>,
    Name(id): Name,
    Params(wanted): Params<Inspect>,
) -> Result<Json<ForkNetworkInfo>, Error> {
    Ok(Json(attached(&shared, &id)?.inspect(wanted.denials_from).await?))
}

/// Changes what a fork may reach. Connections that are not allowed any more are reset.
#[utoipa::path(
    put, path = "/v1/forks/{id}/network", tag = "forks", request_body = SetForkNetwork,
    params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = ForkNetworkInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn set(
    State(shared): State<Shared>,
    Name(id): Name,
    Body(change): Body<SetForkNetwork>,
) -> Result<Json<ForkNetworkInfo>, Error> {
    let attached = attached(&shared, &id)?;
    attached.set_egress(&shared.engine, change.egress).await?;
    Ok(Json(attached.inspect(u64::MAX).await?))
}

fn attached(shared: &Shared, id: &str) -> Result<Arc<Attached>, Error> {
    let fork = running(shared, id)?;
    fork.attached().ok_or_else(|| Error::new(Code::NoNetwork, format!("fork {} has no NIC", fork.id)))
}
