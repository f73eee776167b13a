"""Encryption of a request: an AES key wrapped for one factory's RSA key, and values under that AES key.

Formats are glideinWMS 3.10's, so a real frontend or factory understands them. Their weakness is kept with them: one
IV for all values of a key, and no MAC; integrity comes from HTCondor's encrypted channel to the collector.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from . import ProtocolError

#: RSA key length in bits, glideinWMS's default.
KEY_BITS = 2048

_BLOCK_BITS = 128
_SESSION = re.compile(r"cypher:aes_256_cbc,key:([0-9a-f]{64}),iv:([0-9a-f]{32})")


def _oaep() -> padding.OAEP:
    # SHA-1 is the protocol's; inside OAEP it is not relied upon for collision resistance.
    return padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=None)  # noqa: S303


def key_id(public_pem: str) -> str:
    """Return the PubKeyID of ``public_pem``: the MD5 of ``RSA `` and the PEM text, in hex (a name, not a check)."""
    return hashlib.md5(b"RSA " + public_pem.encode(), usedforsecurity=False).hexdigest()


def _unhex(text: str, what: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"{what} is not hexadecimal: {error}") from error


@dataclass(frozen=True)
class SessionKey:
    """An AES-256-CBC key and IV that a frontend makes for one factory key; never shown in a repr."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)

    @classmethod
    def new(cls) -> SessionKey:
        """Return a random one."""
        return cls(secrets.token_bytes(32), secrets.token_bytes(16))

    def wrapped(self, public_pem: str) -> str:
        """Return ReqEncKeyCode: this key for the owner of ``public_pem`` only (RSA-OAEP, hex).

        Raises:
            ProtocolError: ``public_pem`` is no RSA public key.
        """
        try:
            public = serialization.load_pem_public_key(public_pem.encode())
        except ValueError as error:
            raise ProtocolError(f"PubKeyValue is not a PEM public key: {error}") from error
        if not isinstance(public, rsa.RSAPublicKey):
            raise ProtocolError("PubKeyValue is not an RSA key")
        text = f"cypher:aes_256_cbc,key:{self.key.hex()},iv:{self.iv.hex()}"
        return public.encrypt(text.encode(), _oaep()).hex()

    def encrypt(self, value: str) -> str:
        """Return ``value`` encrypted (AES-CBC, PKCS#7, hex)."""
        padder = PKCS7(_BLOCK_BITS).padder()
        padded = padder.update(value.encode()) + padder.finalize()
        encryptor = Cipher(algorithms.AES(self.key), modes.CBC(self.iv)).encryptor()
        return (encryptor.update(padded) + encryptor.finalize()).hex()

    def decrypt(self, code: str, what: str = "value") -> str:
        """Return the text of ``code``; ``what`` names it in the error.

        Raises:
            ProtocolError: not hex, not encrypted under this key, or not text.
        """
        data = _unhex(code, what)
        decryptor = Cipher(algorithms.AES(self.key), modes.CBC(self.iv)).decryptor()
        unpadder = PKCS7(_BLOCK_BITS).unpadder()
        try:
            padded = decryptor.update(data) + decryptor.finalize()
            return (unpadder.update(padded) + unpadder.finalize()).decode()
        except ValueError as error:
            raise ProtocolError(f"{what} cannot be decrypted") from error


class FactoryKey:
    """A factory's RSA key. It lives in memory only: after a restart frontends read the new one in their next loop."""

    def __init__(self, private: rsa.RSAPrivateKey) -> None:
        self._private = private
        self.public_pem: str = (
            private.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )
        self.key_id: str = key_id(self.public_pem)

    @classmethod
    def generate(cls) -> FactoryKey:
        """Return a new random key of KEY_BITS."""
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS))

    def unwrap(self, code: str) -> SessionKey:
        """Return the session key inside ReqEncKeyCode.

        Raises:
            ProtocolError: not for this key, or not a session key; aes_256_cbc is the only cipher taken.
        """
        data = _unhex(code, "ReqEncKeyCode")
        try:
            text = self._private.decrypt(data, _oaep()).decode()
        except ValueError as error:
            raise ProtocolError("ReqEncKeyCode cannot be decrypted with this factory's key") from error
        found = _SESSION.fullmatch(text)
        if found is None:
            raise ProtocolError("ReqEncKeyCode holds no aes_256_cbc key")
        return SessionKey(bytes.fromhex(found[1]), bytes.fromhex(found[2]))
