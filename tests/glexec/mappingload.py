"""Keep-alive clients of a mapping service, run in the bed: prints answers a second and their latencies as JSON.

     python3 mappingload.py URL CLIENTS SECONDS [CERTIFICATE KEY CA_DIRECTORY]

A client is a thread-free loop over all connections: each sends its next request when its answer has come, so that the
clients take as little of the two cores as Python allows.
"""

import json
import selectors
import socket
import ssl
import statistics
import sys
import time
from urllib.parse import urlsplit

BODY = json.dumps({"dn": "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice", "fqans": ["/gridlab"]}).encode()


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
    request = (
        f"POST {url.path} HTTP/1.1\r\nHost: {url.hostname}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY
    selector, sent, taken, bad = selectors.DefaultSelector(), {}, [], 0
    connections = [connect(url, credential) for _ in range(int(clients))]
    begin = time.perf_counter()
    for connection in connections:
        selector.register(connection, selectors.EVENT_READ)
        sent[connection] = time.perf_counter()
        connection.sendall(request)
    while (now := time.perf_counter()) - begin < float(seconds):
        for key, _ in selector.select(1):
            answer = key.fileobj.recv(65536)
            bad += b" 200 OK" not in answer[:20] or (b"permit" not in answer and b"bare" not in answer)
            taken.append(time.perf_counter() - sent[key.fileobj])
            sent[key.fileobj] = time.perf_counter()
            key.fileobj.sendall(request)
    taken.sort()
    print(json.dumps({
        "clients": int(clients), "per_second": round(len(taken) / (now - begin)), "bad": bad,
        "median_ms": round(1000 * statistics.median(taken), 2),
        "p99_ms": round(1000 * taken[len(taken) * 99 // 100], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
