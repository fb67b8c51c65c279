//! Which templates and forks there are. One lock, held for look-ups and insertions only, never across an await.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use crate::{
    api::error::{Code, Error},
    fork::Fork,
    limits::{DEAD_TTL, MAX_DEAD},
    template::Template,
};

#[derive(Debug)]
enum Slot {
    /// Being built or removed: the name is taken, nothing can be forked.
    Reserved,
    Present(Arc<Template>),
}

#[derive(Debug, Default)]
struct Inner {
    templates: HashMap<String, Slot>,
    /// Living and dead, by id.
    forks: HashMap<String, Arc<Fork>>,
    /// Latest fork of each name; a dead one's name is free.
    names: HashMap<String, String>,
    /// Ids of the dead, oldest first.
    dead: VecDeque<(Instant, String)>,
    alive: u64,
    /// Those alive by template.
    living: HashMap<String, Living>,
    /// How many ever ended.
    ended: u64,
    closed: bool,
}

/// Forks of one template whose processes are not reaped.
#[derive(Clone, Copy, Debug)]
pub struct Living {
    /// How many.
    pub forks: u64,
    /// Guest memory of each in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs of each.
    pub vcpus: u8,
}

/// What there is, in short.
#[derive(Debug)]
pub struct Survey {
    /// By template.
    pub living: HashMap<String, Living>,
    /// Some of the living.
    pub some: Vec<Arc<Fork>>,
    /// How many forks ever ended.
    pub ended: u64,
}

/// The daemon's templates and forks.
#[derive(Debug, Default)]
pub struct Registry(Mutex<Inner>);

/// A template name that is taken while its owner builds or removes it. Dropped, the name is free again.
#[derive(Debug)]
pub struct Reservation {
    registry: Arc<Registry>,
    name: String,
    settled: bool,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no panic under this lock")
    }

    /// Takes a template name.
    pub fn reserve(self: &Arc<Self>, name: &str) -> Result<Reservation, Error> {
        let mut inner = self.lock();
        inner.check_open()?;
        match inner.templates.get(name) {
            Some(Slot::Present(_)) => {
                Err(Error::new(Code::TemplateExists, format!("template {name} exists already")))
            }
            Some(Slot::Reserved) => {
                Err(Error::new(Code::TemplateExists, format!("template {name} is being built or removed")))
            }
            None => {
                inner.templates.insert(name.to_owned(), Slot::Reserved);
                Ok(Reservation { registry: self.clone(), name: name.to_owned(), settled: false })
            }
        }
    }

    /// Takes a template out, so that it can be removed. Refused while it has forks.
    pub fn take_template(self: &Arc<Self>, name: &str) -> Result<(Arc<Template>, Reservation), Error> {
        let template = self.template(name)?;
        let mut inner = self.lock();
        let users: Vec<String> =
            inner.living().filter(|f| f.template.name() == name).map(|f| f.id.clone()).collect();
        if !users.is_empty() {
            const SHOWN: usize = 10;
            let more = users.len().saturating_sub(SHOWN);
            let shown = users[..users.len().min(SHOWN)].join(", ");
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return Err(Error::new(Code::TemplateInUse, format!("template {name} has forks: {shown}{more}")));
        }
        inner.templates.insert(name.to_owned(), Slot::Reserved);
        Ok((template, Reservation { registry: self.clone(), name: name.to_owned(), settled: false }))
    }

    /// Looks up a template.
    pub fn template(&self, name: &str) -> Result<Arc<Template>, Error> {
        match self.lock().templates.get(name) {
            Some(Slot::Present(template)) => Ok(template.clone()),
            Some(Slot::Reserved) => {
                Err(Error::new(Code::TemplateNotFound, format!("template {name} is being built or removed")))
            }
            None => Err(Error::new(Code::TemplateNotFound, format!("there is no template {name}"))),
        }
    }

    /// All templates by name.
    pub fn templates(&self) -> Vec<Arc<Template>> {
        let inner = self.lock();
        let mut all: Vec<_> = inner
            .templates
            .values()
            .filter_map(|slot| match slot {
                Slot::Present(template) => Some(template.clone()),
                Slot::Reserved => None,
            })
            .collect();
        all.sort_by(|a, b| a.name().cmp(b.name()));
        all
    }

    /// Enters a fork that is about to be made.
    pub fn insert_fork(&self, fork: &Arc<Fork>, limit: u64) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.check_open()?;
        if inner.alive >= limit {
            return Err(Error::new(
                Code::TooManyForks,
                format!("{limit} forks are alive, the most this daemon takes"),
            ));
        }
        // Looked up before, but it may have been removed or replaced since.
        match inner.templates.get(fork.template.name()) {
            Some(Slot::Present(template)) if Arc::ptr_eq(template, &fork.template) => {}
            _ => {
                let name = fork.template.name();
                return Err(Error::new(Code::TemplateNotFound, format!("template {name} was removed")));
            }
        }
        if let Some(name) = &fork.name {
            let holder = inner.names.get(name).and_then(|id| inner.forks.get(id));
            if holder.is_some_and(|fork| fork.is_alive()) || inner.forks.contains_key(name) {
                return Err(Error::new(Code::ForkExists, format!("a fork named {name} is alive")));
            }
            inner.names.insert(name.clone(), fork.id.clone());
        }
        let spec = &fork.template.record.spec;
        let none = Living { forks: 0, memory_mib: spec.memory_mib, vcpus: spec.vcpus };
        match inner.living.get_mut(fork.template.name()) {
            Some(living) => living.forks += 1,
            None => drop(inner.living.insert(fork.template.name().to_owned(), Living { forks: 1, ..none })),
        }
        inner.alive += 1;
        inner.forks.insert(fork.id.clone(), fork.clone());
        Ok(())
    }

    /// Makes a dead fork's record one of the dead.
    pub fn fork_died(&self, fork: &Arc<Fork>) {
        let mut inner = self.lock();
        inner.alive -= 1;
        inner.ended += 1;
        let name = fork.template.name();
        if let Some(living) = inner.living.get_mut(name) {
            living.forks -= 1;
            if living.forks == 0 {
                inner.living.remove(name);
            }
        }
        inner.dead.push_back((Instant::now(), fork.id.clone()));
        inner.forget_old();
    }

    /// Looks up a fork by id or name; of a name, the latest.
    pub fn fork(&self, id: &str) -> Result<Arc<Fork>, Error> {
        let mut inner = self.lock();
        inner.forget_old();
        let id_of_name = inner.names.get(id);
        let found = inner.forks.get(id_of_name.map_or(id, String::as_str)).cloned();
        found.ok_or_else(|| Error::new(Code::ForkNotFound, format!("there is no fork {id}")))
    }

    /// Forks in the order of their making, the dead among them if asked for.
    pub fn forks(&self, template: Option<&str>, dead: bool) -> Vec<Arc<Fork>> {
        let inner = self.lock();
        let mut forks: Vec<_> = inner
            .forks
            .values()
            .filter(|fork| dead || fork.is_alive())
            .filter(|fork| template.is_none_or(|name| fork.template.name() == name))
            .cloned()
            .collect();
        drop(inner);
        forks.sort_by_cached_key(|fork| (fork.created_unix_ms, fork.generation()));
        forks
    }

    /// How many living forks a template has.
    pub fn forks_of(&self, template: &str) -> u64 {
        self.lock().living().filter(|fork| fork.template.name() == template).count() as u64
    }

    /// What there is, and up to `take` of the living after the first `skip` records, in no particular order.
    pub fn survey(&self, skip: usize, take: usize) -> Survey {
        let inner = self.lock();
        let some = inner.forks.values().skip(skip).filter(|fork| fork.is_alive()).take(take).cloned();
        Survey { some: some.collect(), living: inner.living.clone(), ended: inner.ended }
    }

    /// How many processes of forks there are.
    pub fn alive(&self) -> u64 {
        self.lock().alive
    }

    /// Refuses everything new from now on.
    pub fn close(&self) {
        self.lock().closed = true;
    }
}

impl Inner {
    fn check_open(&self) -> Result<(), Error> {
        if self.closed { Err(Error::new(Code::ShuttingDown, "the daemon is ending")) } else { Ok(()) }
    }

    fn living(&self) -> impl Iterator<Item = &Arc<Fork>> {
        self.forks.values().filter(|fork| fork.is_alive())
    }

    fn forget_old(&mut self) {
        while let Some((since, _)) = self.dead.front() {
            if self.dead.len() <= MAX_DEAD && since.elapsed() < DEAD_TTL {
                break;
            }
            let (_, id) = self.dead.pop_front().expect("just looked at it");
            let name = self.forks.remove(&id).and_then(|fork| fork.name.clone());
            if let Some(name) = name
                && self.names.get(&name) == Some(&id)
            {
                self.names.remove(&name);
            }
        }
    }
}

impl Reservation {
    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts a template in its place.
    pub fn fill(mut self, template: Arc<Template>) {
        self.settled = true;
        self.registry.lock().templates.insert(self.name.clone(), Slot::Present(template));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.settled {
            self.registry.lock().templates.remove(&self.name);
        }
    }
}
