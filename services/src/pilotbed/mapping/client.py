"""How glexec asks its site's mapping service. Standard library only."""

import http.client
import ssl
from dataclasses import dataclass
from pathlib import Path

from . import json_face
from .model import LARGEST, Answer, BadRequest, Subject


class ServiceError(Exception):
    """The service gave no answer that can be used; the message says why."""


@dataclass(frozen=True)
class Client:
    """A mapping service, and what this end shows and believes.

    Attributes:
        service: the service's host name and port, ``host:port``; its certificate must be for that name.
        certificate: path of the certificate that this end shows (PEM).
        key: path of its key.
        ca_directory: directory of CAs and their CRLs, by OpenSSL's hashed names (c_rehash).
        timeout: seconds that a single step may take; the whole is the caller's to bound.
    """

    service: str
    certificate: Path
    key: Path
    ca_directory: Path
    timeout: float

    def ask(self, subject: Subject) -> Answer:
        """Return the site's answer about a user.

        Raises:
            ServiceError: there is none.
        """
        host, _, port = self.service.rpartition(":")
        try:
            context = self._context()
            connection = http.client.HTTPSConnection(host, int(port), timeout=self.timeout, context=context)
            connection.request("POST", "/map", json_face.request(subject), {"Content-Type": json_face.TYPE})
            response = connection.getresponse()
            message = response.read(LARGEST + 1)
            if response.status != http.client.OK:
                raise ServiceError(f"{self.service} says {response.status}: {message[:200].decode(errors='replace')}")
            return json_face.answer(message)
        except BadRequest as error:
            raise ServiceError(f"{self.service} gives no proper answer: {error}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceError(f"{self.service}: {error or type(error).__name__}") from error

    def _context(self) -> ssl.SSLContext:
        """Return TLS 1.3 with a certificate, to a server whose CA and CRL are in the directory."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.load_verify_locations(capath=str(self.ca_directory))
        context.load_cert_chain(str(self.certificate), str(self.key))
        return context
