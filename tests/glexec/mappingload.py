"""Keep-alive clients of a mapping service, run in the bed: prints answers a second and their latencies as JSON.

     python3 mappingload.py URL CLIENTS SECONDS [CERTIFICATE KEY CA_DIRECTORY]

A client is a thread-free loop over all connections: each sends its next request when its answer has come, so that the
clients take as little of the two cores as Python allows. Each asks for a user of its own, up to USERS of them. An
answer is bad if it is none, is not the one that the user had before, or names an account that another user has.

All have had an answer before the time begins.
"""

import json
import selectors
import socket
import ssl
import statistics
import sys
import time
from urllib.parse import urlsplit

#: No more than the pool has accounts.
USERS = 16


def request(url, user):
    dn = f"/DC=test/DC=grid/O=Gridlab/OU=People/CN=User {user}"
    body = json.dumps({"dn": dn, "fqans": ["/gridlab"]})
    return (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.hostname}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def connect(url, credential):
    raw = socket.create_connection((url.hostname, url.port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if url.scheme == "http":
        return raw
    context = ssl.create_default_context(capath=credential[2])
    context.load_cert_chain(*credential[:2])
    return context.wrap_socket(raw, server_hostname=url.hostname)


def main(where, clients, seconds, *credential):
    url = urlsplit(where)
    selector, sent, taken, bad = selectors.DefaultSelector(), {}, [], 0
    answer_of, user_of = {}, {}

    def good(user, answer):
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 OK\r\n") or answer_of.setdefault(user, body) != body:
            return False
        return body == b"bare" or (b"permit" in body and user_of.setdefault(body, user) == user)

    for number in range(int(clients)):
        user = number % USERS
        connection = connect(url, credential)
        connection.sendall(request(url, user))
        bad += not good(user, connection.recv(65536))
        selector.register(connection, selectors.EVENT_READ, (user, request(url, user)))
    begin = time.perf_counter()
    for key in selector.get_map().values():
        sent[key.fileobj] = time.perf_counter()
        key.fileobj.sendall(key.data[1])
    while (now := time.perf_counter()) - begin < float(seconds):
        for key, _ in selector.select(1):
            user, again = key.data
            bad += not good(user, key.fileobj.recv(65536))
            taken.append(time.perf_counter() - sent[key.fileobj])
            sent[key.fileobj] = time.perf_counter()
            key.fileobj.sendall(again)
    taken.sort()
    print(json.dumps({
        "clients": int(clients), "answers": len(taken), "bad": bad, "per_second": round(len(taken) / (now - begin)),
        "median_ms": round(1000 * statistics.median(taken), 2),
        "p99_ms": round(1000 * taken[len(taken) * 99 // 100], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
