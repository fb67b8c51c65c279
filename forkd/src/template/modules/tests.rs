use super::*;

const DEP: &str = "\
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/nvdimm/libnvdimm.ko:
kernel/drivers/nvdimm/nd_btt.ko: kernel/drivers/nvdimm/libnvdimm.ko
kernel/drivers/nvdimm/nd_pmem.ko: kernel/drivers/nvdimm/nd_btt.ko kernel/drivers/nvdimm/libnvdimm.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
a/loop.ko: a/pool.ko
a/pool.ko: a/loop.ko
a/lost.ko: a/nowhere.ko
";
const BUILTIN: &str = "kernel/drivers/char/hw_random/rng-core.ko\nkernel/fs/overlayfs/overlay.ko\n";

fn names(wanted: &[&str]) -> Vec<String> {
    load_order(DEP, BUILTIN, wanted).unwrap().into_iter().map(name_of).collect()
}

#[test]
fn dependencies_come_first_and_once() {
    assert_eq!(
        names(&["virtio_mmio", "nd_pmem", "virtio_mmio"]),
        ["virtio", "virtio_ring", "virtio_mmio", "libnvdimm", "nd_btt", "nd_pmem"]
    );
}

#[test]
fn dash_and_underscore_are_one() {
    assert_eq!(names(&["virtio_rng"]), ["virtio", "virtio_ring", "virtio_rng"]);
    assert_eq!(names(&["virtio-rng"]), names(&["virtio_rng"]));
}

#[test]
fn built_in_modules_need_no_file() {
    assert!(names(&["overlay", "rng_core"]).is_empty());
}

#[test]
fn a_module_the_kernel_lacks_is_named() {
    let error = load_order(DEP, BUILTIN, &["erofs"]).unwrap_err();
    assert_eq!(error, Error::Missing { name: "erofs".into() });
    assert!(error.to_string().contains("no module erofs"));
}

#[test]
fn broken_tables_are_errors() {
    assert!(matches!(load_order(DEP, "", &["loop"]), Err(Error::Cycle { .. })));
    assert_eq!(load_order(DEP, "", &["lost"]), Err(Error::Undescribed { path: "a/nowhere.ko".into() }));
    assert!(matches!(load_order("", "", &["loop"]), Err(Error::Missing { .. })));
}

#[test]
fn paths_are_as_in_the_table() {
    let order = load_order(DEP, BUILTIN, &["virtio_rng"]).unwrap();
    assert_eq!(order.last(), Some(&"kernel/drivers/char/hw_random/virtio-rng.ko.xz"));
}
