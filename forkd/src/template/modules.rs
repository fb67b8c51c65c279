//! Which kernel modules a guest needs, as files in the order in which they can be loaded.
//!
//! Pure functions over the text of `modules.dep` and `modules.builtin` (depmod(8)), so that they can be tested
//! without a kernel. `-` and `_` are the same character in a module's name, as for modprobe(8).

use std::collections::{HashMap, HashSet};

/// What a guest on this VMM needs beyond a stock kernel's built-in code. What is built in is left out by
/// [`load_order`], so the same list serves Debian's 6.1 and 6.12 cloud kernels.
///
/// With Debian 6.1 (6.1.0-56-cloud-amd64) it becomes, in load order: virtio_ring, virtio, virtio_mmio, libnvdimm,
/// nd_virtio, virtio_pmem, nd_btt, nd_pmem, libcrc32c, erofs, overlay, vsock, vmw_vsock_virtio_transport_common,
/// vmw_vsock_virtio_transport, virtio-rng. Built in there: dax, lz4_decompress, crc32c_generic, rng-core.
pub const REQUIRED: [&str; 7] =
    ["virtio_mmio", "virtio_pmem", "nd_pmem", "erofs", "overlay", "vmw_vsock_virtio_transport", "virtio_rng"];

/// Needed by guests with a NIC (Debian 6.1 adds failover and net_failover).
pub const NETWORK: [&str; 1] = ["virtio_net"];

/// Why the modules of a kernel cannot be listed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither a module file nor built in.
    #[error("the kernel has no module {name}, neither as a file nor built in; use a kernel that has it")]
    Missing {
        /// Name as asked for.
        name: String,
    },
    /// `modules.dep` names a file it has no line for.
    #[error("modules.dep does not describe {path}; run depmod for this kernel")]
    Undescribed {
        /// Path as in `modules.dep`.
        path: String,
    },
    /// A module needs itself, directly or not.
    #[error("modules.dep has a cycle through {path}; run depmod for this kernel")]
    Cycle {
        /// Path as in `modules.dep`.
        path: String,
    },
}

/// Paths, relative to the directory of `modules.dep`, of the `wanted` modules and all they need: each once, and
/// each after those it needs. Modules in `modules_builtin` need no file and are left out.
pub fn load_order<'a>(
    modules_dep: &'a str,
    modules_builtin: &str,
    wanted: &[&str],
) -> Result<Vec<&'a str>, Error> {
    let graph = Graph::parse(modules_dep);
    let builtin: HashSet<String> = modules_builtin.lines().map(|line| name_of(line.trim())).collect();
    let mut order = Order { graph: &graph, files: Vec::new(), done: HashSet::new(), open: HashSet::new() };
    for name in wanted {
        let key = normalize(name);
        match graph.path_of.get(&key) {
            Some(path) => order.visit(path)?,
            None if builtin.contains(&key) => {}
            None => return Err(Error::Missing { name: (*name).to_owned() }),
        }
    }
    Ok(order.files)
}

/// The dependency graph in `modules.dep`; every line is `path: path path ...`.
struct Graph<'a> {
    path_of: HashMap<String, &'a str>,
    needs: HashMap<&'a str, Vec<&'a str>>,
}

impl<'a> Graph<'a> {
    fn parse(text: &'a str) -> Self {
        let needs: HashMap<&str, Vec<&str>> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| (path.trim(), needs.split_whitespace().collect()))
            .collect();
        let path_of = needs.keys().map(|path| (name_of(path), *path)).collect();
        Self { path_of, needs }
    }
}

/// A depth-first walk that appends a module after all it needs.
struct Order<'a, 'g> {
    graph: &'g Graph<'a>,
    files: Vec<&'a str>,
    done: HashSet<&'a str>,
    open: HashSet<&'a str>,
}

impl<'a> Order<'a, '_> {
    fn visit(&mut self, path: &'a str) -> Result<(), Error> {
        if self.done.contains(path) {
            return Ok(());
        }
        if !self.open.insert(path) {
            return Err(Error::Cycle { path: path.to_owned() });
        }
        let needs = self.graph.needs.get(path).ok_or_else(|| Error::Undescribed { path: path.to_owned() })?;
        // depmod lists the whole closure, the deepest last; modprobe loads it from the end.
        for needed in needs.iter().rev() {
            self.visit(needed)?;
        }
        self.open.remove(path);
        self.done.insert(path);
        self.files.push(path);
        Ok(())
    }
}

/// Module name of a path such as `kernel/fs/erofs/erofs.ko` or `.../virtio-rng.ko.xz`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normalize(file.split_once(".ko").map_or(file, |(stem, _)| stem))
}

fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests;
