"""The mapping service: one a site, it says which account a user has there. See docs/mapping.md.

``model`` and its two faces, ``json_face`` and ``xacml``, know nothing of sockets; ``app`` is the service (Flask, over
LCMAPS), ``client`` what glexec asks it with, ``arc`` the computing element's plug-in, which asks LCMAPS itself.
"""

#: The local account that LCMAPS runs as, on computing elements and workers; it owns the leases.
MAPPER_ACCOUNT = "glexec"
#: Characters of a DN in OpenSSL's one-line form: one of a Chinese name has twelve, and a CN up to 64 of them.
LARGEST_DN = 2048
