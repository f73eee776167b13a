"""The grid's own certificate authority: one RSA key, a directory of issued certificates, a CRL."""
