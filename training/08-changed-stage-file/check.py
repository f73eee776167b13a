"""The staged file that was changed: what a worker fetches must have the signed digest, straight and by the cache."""

import json
from collections.abc import Iterator

from pilotbed_suite import inventory
from pilotbed_training import examine

ALLOWED = ()
#: On a worker: fetches what the signature lists, and prints what has another digest.
#: Arguments: URL, proxy, description, digest of the signature file.
FETCH = r"""
import hashlib, sys, urllib.request
web, proxy, descript, sign = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy} if proxy else {}))
def get(name):
    with opener.open(web + "/" + name, timeout=20) as answer:
        return answer.read()
signature = get(descript.replace("description", "signature").replace(".cfg", ".sha256"))
if hashlib.sha256(signature).hexdigest() != sign:
    print("the list of digests itself")
for line in signature.decode().splitlines():
    digest, name = line.split()
    if hashlib.sha256(get(name)).hexdigest() != digest:
        print(name)
"""


def _wrong(cache: str) -> Iterator[str]:
    known = inventory.load()
    manifest = json.loads(examine.said(examine.service("factory"), "cat /var/lib/pilotbed/factory/stage/manifest.json"))
    main = manifest["main"]
    for name in known.names("worker"):
        done = examine.host(name).run(
            "python3 -I -c %s %s %s %s %s", FETCH, manifest["web"], cache, main["descript"], main["sign"]
        )
        found = done.stdout.split("\n") if done.rc == 0 else [done.stderr.strip()[-200:]]
        yield from (f"{name} gets {each}, which has not the signed digest" for each in found if each)


def stage_area_is_signed() -> Iterator[str]:
    """What a worker fetches straight from the factory is what was signed."""
    yield from _wrong("")


def cache_is_good() -> Iterator[str]:
    """What a worker fetches by the site's cache is what was signed."""
    known = inventory.load()
    for name in known.names("web_cache"):
        yield from _wrong(f"http://{name}.{known.variable('grid_domain')}:3128")


def jobs_have_run() -> Iterator[str]:
    """Alice's job has run, through a pilot that was started since."""
    yield from examine.called_jobs_end_well("lesson-08", 1)


CHECKS = (stage_area_is_signed, cache_is_good)
JOBS = (jobs_have_run,)
