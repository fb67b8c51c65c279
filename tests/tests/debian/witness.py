"""A service started before the freeze: tells what a process that lived through it sees. Connect to 127.0.0.1:7000."""
import json, os, secrets, signal, socket, threading, time, uuid

SECRET = secrets.token_hex(16)
samples = [time.monotonic()]
timer = {}


def generation():
    try:
        with open("/run/forkling/generation") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def fire():
    timer.update(at=time.monotonic(), generation=generation())


def wait_busily():
    """How long 20 ms take a process that never sleeps. A kernel that goes idle sets its timer anew, and it would not be seen that it was wrong."""
    fired = []
    signal.signal(signal.SIGALRM, lambda *_: fired.append(True))
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    while not fired and time.monotonic() - start < 10:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return time.monotonic() - start


alarm = threading.Timer(TIMER_SECONDS, fire)
alarm.daemon = True
armed = time.monotonic()
alarm.start()

server = socket.create_server(("127.0.0.1", 7000))
while True:
    peer, _ = server.accept()
    samples.append(time.monotonic())
    with open("/proc/sys/kernel/random/uuid") as file:
        kernel_uuid = file.read().strip()
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    answer = {
        "pid": os.getpid(),
        "boot_id": boot_id,
        "secret": SECRET,
        "getrandom": os.getrandom(32).hex(),
        "kernel_uuid": kernel_uuid,
        "uuid4": str(uuid.uuid4()),
        "token": secrets.token_hex(16),
        "hostname": socket.gethostname(),
        "generation": generation(),
        "monotonic": samples,
        "wall": time.time(),
        "armed": armed,
        "waited": wait_busily(),
        "timer": timer,
    }
    peer.sendall(json.dumps(answer).encode())
    peer.close()
