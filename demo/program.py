"""What every fork of the demo runs: prints a random number of its own, its host name, and prime number N."""

import os
import secrets
import sys


def nth_prime(n: int) -> int:
    primes: list[int] = []
    candidate = 2
    while len(primes) < n:
        if all(candidate % prime for prime in primes if prime * prime <= candidate):
            primes.append(candidate)
        candidate += 1
    return primes[-1]


print(secrets.token_hex(8), os.uname().nodename, nth_prime(int(sys.argv[1])))
