//! Which forks the host has room for. What does not fit is refused at once, with what to do and when to come back;
//! nothing is made that the host would have to kill.
//!
//! Four things run out: cores (constructions wait for each other), memory, processes, and the daemon's descriptors
//! (those are counted exactly, by [`crate::registry`]). The host is looked at in the background, see [`keep`]; between
//! two looks, what was granted is subtracted. A request costs a lock and some additions, no system call.
//!
//! A fork shares its template's memory until it writes, so memory is promised, not taken. What is promised to a fork is
//! what forks of its template have been seen to hold, times a factor, and never less than a floor (`growth`). Parked
//! forks are memory in reserve: they are given up before a request is refused.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use growth::{Forecast, Growth};
use host::{Host, Limit, Room};
pub use ledger::Rates;
use ledger::{Ledger, Need};

use crate::{
    api::error::{Code, Error},
    engine::Engine,
    limits,
    template::Template,
};

mod growth;
mod host;
mod ledger;

/// How old a look at the host may be while forks are asked for.
const FRESH: Duration = Duration::from_millis(100);

/// How often the host is looked at when nobody asks for forks.
const IDLE: Duration = Duration::from_secs(1);

/// How long a request waits for the memory of parked forks that were given up for it.
const RELIEF: Duration = Duration::from_secs(1);

/// Forks whose memory is looked at each time.
const SAMPLED: usize = 16;

/// Threads of a fork's process beside its vCPUs: the event loop, and one that KVM adds to each VM.
const THREADS: u64 = 2;

/// Bytes of a fork whatever its guest does: the process, its page tables, KVM's own. Measured with the null guest.
const OVERHEAD: u64 = 1536 << 10;

/// What an operator may set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Bytes of memory that stay free; a share of the host's if none.
    pub reserve: Option<u64>,
    /// Bytes that a fork is expected to take at least.
    pub growth: u64,
    /// What is set aside for a fork, as a multiple of what forks of its template have been seen to take.
    pub factor: f64,
    /// Children that may wait for their construction.
    pub queue: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { reserve: None, growth: 4 << 20, factor: 1.25, queue: limits::MAX_QUEUE }
    }
}

/// Grants forks.
#[derive(Debug)]
pub struct Admission {
    settings: Settings,
    host: Host,
    /// Constructions at once.
    builders: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    forecast: Forecast,
    /// Where the next look at forks begins.
    turn: usize,
    looked: Instant,
    /// Whether a fork was asked for since.
    asked: bool,
}

/// Leave to make one child. Held until it is made or has failed.
#[derive(Debug)]
pub struct Ticket {
    admission: Arc<Admission>,
    need: Need,
    made: bool,
}

impl Ticket {
    /// The fork is there, and what was set aside is its own.
    pub fn made(mut self) {
        self.made = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.state().ledger.settle(&self.need, self.made);
    }
}

/// What a request got.
#[derive(Debug)]
pub struct Granted {
    /// For its first children, as many as fit.
    pub tickets: Vec<Ticket>,
    /// Why there are not more.
    pub refusal: Option<Error>,
}

impl Admission {
    /// With a first look at the host.
    pub fn new(settings: Settings, builders: usize) -> Arc<Self> {
        let host = Host::new("/".into(), settings.reserve);
        let room = host.look();
        let state = State {
            ledger: Ledger::new(room),
            forecast: Forecast::default(),
            turn: 0,
            looked: Instant::now(),
            asked: false,
        };
        Arc::new(Self { settings, host, builders: builders as u64, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }

    /// Bytes of memory available to forks at the last look, the reserve included.
    pub fn available(&self) -> u64 {
        self.state().ledger.room.available
    }

    /// How fast forks come and go.
    pub fn rates(&self) -> Rates {
        self.state().ledger.rates
    }

    /// Leave for `count` children of `template`; for fewer if not all fit.
    /// `parked` of them can be served by parked forks.
    pub async fn admit(
        self: &Arc<Self>,
        engine: &Engine,
        template: &Template,
        count: usize,
        parked: u64,
    ) -> Granted {
        let mut granted = self.take(template, count, parked);
        let Some(limit) = granted.short else { return granted.answer(self, engine) };
        drop(granted);
        if self.state().looked.elapsed() > FRESH {
            self.look(engine);
        }
        granted = self.take(template, count, parked);
        if limit == Limit::Memory && granted.short == Some(Limit::Memory) {
            drop(granted);
            granted = self.relieved(engine, template, count, parked).await;
        }
        granted.answer(self, engine)
    }

    /// Gives up parked forks until the children fit, those of other templates first.
    async fn relieved(
        self: &Arc<Self>,
        engine: &Engine,
        template: &Template,
        count: usize,
        parked: u64,
    ) -> Taken {
        let (mut given_up, templates) = (0, engine.registry.templates());
        for other in templates.iter().filter(|other| other.name() != template.name()) {
            given_up += other.pool().give_up(0);
        }
        given_up += template.pool().give_up(parked.min(count as u64) as usize);
        let until = Instant::now() + RELIEF;
        loop {
            self.look(engine);
            let taken = self.take(template, count, parked);
            if given_up == 0 || taken.short != Some(Limit::Memory) || Instant::now() > until {
                return taken;
            }
            drop(taken);
            tokio::time::sleep(RELIEF / 50).await;
        }
    }

    /// What fits now.
    fn take(self: &Arc<Self>, template: &Template, count: usize, parked: u64) -> Taken {
        let spec = &template.record.spec;
        let mut state = self.state();
        state.asked = true;
        let growth = state.forecast.of(template.name(), &self.settings, spec.memory_mib);
        let need = |cold| Need {
            memory: growth.ahead + if cold { OVERHEAD } else { 0 },
            tasks: if cold { u64::from(spec.vcpus) + THREADS } else { 0 },
            cold,
        };
        let most = self.builders + self.settings.queue;
        let mut taken = Taken { tickets: Vec::with_capacity(count), short: None, count, growth };
        for child in 0..count as u64 {
            let need = need(child >= parked);
            if let Err(limit) = state.ledger.grant(&need, most) {
                taken.short = Some(limit);
                break;
            }
            taken.tickets.push(Ticket { admission: self.clone(), need, made: false });
        }
        taken
    }

    /// Looks at the host and at some forks.
    fn look(&self, engine: &Engine) {
        let turn = self.state().turn;
        let survey = engine.registry.survey(turn, SAMPLED);
        let room = self.host.look();
        let held: Vec<_> = survey
            .some
            .iter()
            .filter_map(|fork| Some((fork.template.name(), self.host.held(fork.pid()?)?)))
            .collect();
        let mut state = self.state();
        let state = &mut *state;
        state.turn = if survey.some.len() < SAMPLED { 0 } else { turn + SAMPLED };
        state
            .forecast
            .retain(|name| survey.living.contains_key(name) || engine.registry.template(name).is_ok());
        for (name, bytes) in held {
            state.forecast.saw(name, bytes);
        }
        let promised = survey.living.iter().map(|(name, living)| {
            state.forecast.of(name, &self.settings, living.memory_mib).outstanding() * living.forks
        });
        let promised = promised.sum();
        let own_tasks =
            survey.living.values().map(|living| living.forks * (u64::from(living.vcpus) + THREADS)).sum();
        state.ledger.looked(room, promised, own_tasks, survey.ended, state.looked.elapsed());
        state.looked = Instant::now();
    }

    /// The error for `count` children of which some do not fit.
    fn refusal(&self, limit: Limit, lacking: u64, growth: Growth) -> Error {
        let state = self.state();
        let Room { available, reserve, tasks, bounds, .. } = state.ledger.room;
        let mib = |bytes: u64| bytes >> 20;
        let (message, after) = match limit {
            Limit::Queue => {
                let message = format!(
                    "{} forks are being made or wait for it, the most this daemon lets wait; ask for fewer at \
                     once, or raise forkd's --queue",
                    state.ledger.cold()
                );
                (message, state.ledger.rates.until_made(lacking))
            }
            Limit::Memory => {
                let message = format!(
                    "{} MiB of memory are available, {} MiB of them reserved and {} MiB promised to living forks, \
                     which leaves too little for another one ({} MiB); kill forks that are not needed, or lower \
                     forkd's --memory-reserve, --fork-growth or --memory-factor",
                    mib(available),
                    mib(reserve),
                    mib(state.ledger.promised()),
                    mib(growth.ahead + OVERHEAD).max(1),
                );
                (message, state.ledger.rates.until_ended(lacking))
            }
            Limit::Processes => {
                let message = format!(
                    "only {tasks} more processes and threads may exist here ({bounds}); kill forks that are not \
                     needed, or raise that limit"
                );
                (message, state.ledger.rates.until_ended(lacking))
            }
        };
        Error::new(Code::HostFull, message).retry_after(after)
    }
}

/// See [`Granted`].
struct Taken {
    tickets: Vec<Ticket>,
    short: Option<Limit>,
    count: usize,
    growth: Growth,
}

impl Taken {
    fn answer(self, admission: &Admission, engine: &Engine) -> Granted {
        let lacking = (self.count - self.tickets.len()) as u64;
        let refusal = self.short.map(|limit| {
            tracing::debug!(?limit, lacking, alive = engine.registry.alive(), "refused");
            admission.refusal(limit, lacking, self.growth)
        });
        Granted { tickets: self.tickets, refusal }
    }
}

/// Looks at the host as long as the daemon lives.
pub async fn keep(engine: Arc<Engine>) {
    let admission = &engine.admission;
    loop {
        let asked = std::mem::take(&mut admission.state().asked);
        tokio::time::sleep(if asked { FRESH } else { IDLE }).await;
        admission.look(&engine);
    }
}

#[cfg(test)]
mod tests;
