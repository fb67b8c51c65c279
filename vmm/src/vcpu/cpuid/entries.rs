//! CPUID leaves as data: looked up, changed, written to a snapshot and read back.

use std::{fmt, str::FromStr};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// One output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// The answer to one CPUID question.
///
/// Written as `function.index/flags eax ebx ecx edx`, all hexadecimal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Leaf {
    /// EAX of the question.
    pub function: u32,
    /// ECX of the question, where it matters.
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

/// A string that is not a [`Leaf`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed CPUID leaf {0:?}; the snapshot is damaged")]
pub struct MalformedLeaf(String);

impl Leaf {
    /// A leaf whose answer depends on the index.
    pub fn indexed(function: u32, index: u32) -> Self {
        Self { function, index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..Self::default() }
    }

    /// One register of the answer.
    pub fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    /// One register of the answer, to change it.
    pub fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

impl fmt::Display for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, flags, eax, ebx, ecx, edx } = self;
        write!(f, "{function:08x}.{index:x}/{flags:x} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}")
    }
}

impl From<Leaf> for String {
    fn from(leaf: Leaf) -> Self {
        leaf.to_string()
    }
}

impl FromStr for Leaf {
    type Err = MalformedLeaf;

    fn from_str(text: &str) -> Result<Self, MalformedLeaf> {
        let parse = || {
            let hex = |word: &str| -> Option<u32> {
                // from_str_radix would take a sign.
                let all_hex = word.bytes().all(|b| b.is_ascii_hexdigit());
                if all_hex { u32::from_str_radix(word, 16).ok() } else { None }
            };
            let (question, answer) = text.split_once(' ')?;
            let (function, rest) = question.split_once('.')?;
            let (index, flags) = rest.split_once('/')?;
            let mut words = answer.split(' ').map(hex);
            let leaf = Self {
                function: hex(function)?,
                index: hex(index)?,
                flags: hex(flags)?,
                eax: words.next()??,
                ebx: words.next()??,
                ecx: words.next()??,
                edx: words.next()??,
            };
            if words.next().is_none() { Some(leaf) } else { None }
        };
        parse().ok_or_else(|| MalformedLeaf(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for Leaf {
    type Error = MalformedLeaf;

    fn try_from(text: String) -> Result<Self, MalformedLeaf> {
        text.parse()
    }
}

/// All of one vCPU's CPUID.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuidEntries(Vec<Leaf>);

impl CpuidEntries {
    /// From leaves in any order.
    pub fn new(leaves: Vec<Leaf>) -> Self {
        Self(leaves)
    }

    /// All leaves.
    pub fn leaves(&self) -> &[Leaf] {
        &self.0
    }

    /// The answer to a question, if there is one.
    pub fn get(&self, function: u32, index: u32) -> Option<&Leaf> {
        self.0.iter().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// The answer to a question, to change it.
    pub fn get_mut(&mut self, function: u32, index: u32) -> Option<&mut Leaf> {
        self.0.iter_mut().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// Keeps the leaves for which `keep` holds.
    pub fn retain(&mut self, keep: impl FnMut(&Leaf) -> bool) {
        self.0.retain(keep);
    }

    /// Adds a leaf.
    pub fn push(&mut self, leaf: Leaf) {
        self.0.push(leaf);
    }

    /// All leaves, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Leaf> {
        self.0.iter_mut()
    }

    /// For KVM_SET_CPUID2. Fails if there are more leaves than KVM takes.
    pub fn to_kvm(&self) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let entries: Vec<_> = self.0.iter().map(to_entry).collect();
        CpuId::from_entries(&entries)
    }
}

fn to_entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let Leaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

impl From<&CpuId> for CpuidEntries {
    fn from(cpuid: &CpuId) -> Self {
        let leaves = cpuid.as_slice().iter().map(|entry| {
            let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: _ } = *entry;
            Leaf { function, index, flags, eax, ebx, ecx, edx }
        });
        // KVM_GET_CPUID2 answers with zeroed entries behind the last.
        Self(
            leaves
                .enumerate()
                .filter(|(n, leaf)| *n == 0 || *leaf != Leaf::default())
                .map(|(_, l)| l)
                .collect(),
        )
    }
}
