"""What every fork of the demo runs: argument N, prints JSON."""

import json
import secrets
import socket
import sys


def nth_prime(n: int) -> int:
    primes: list[int] = []
    candidate = 2
    while len(primes) < n:
        for prime in primes:
            if prime * prime > candidate:
                primes.append(candidate)
                break
            if candidate % prime == 0:
                break
        else:
            primes.append(candidate)
        candidate += 1
    return primes[-1]


n = int(sys.argv[1])
print(json.dumps({"random": secrets.token_hex(8), "hostname": socket.gethostname(), "prime": nth_prime(n)}))
