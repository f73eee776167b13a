"""The site's own program after a payload's end: root's, as glexec.conf names it.

Environment: NIKHEF wiki, "GLExec Epilogue Functionality".
"""

import os
import pwd
import subprocess
from collections.abc import Sequence

from .policy import SYSTEM_ERROR, Conf, Refusal

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def run(
    conf: Conf, caller: pwd.struct_passwd, target: pwd.struct_passwd, command: Sequence[str], code: int
) -> None:
    """Run the epilogue. Raises Refusal (202) if it fails or takes longer than epilogue_timeout.

    The caller makes sure that nobody but root can have written the program itself.
    """
    for above in _directories(conf.epilogue):
        found = os.lstat(above)
        if found.st_uid != 0 or found.st_mode & 0o022 or os.path.islink(above):  # noqa: PTH114
            raise Refusal(SYSTEM_ERROR, f"epilogue: {above} must be a directory that only root can write")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "GLEXEC_EPILOG_TARGET_RC": str(code)}
    environment |= {f"GLEXEC_EPILOG_ARGV{number}": word for number, word in enumerate(command)}
    for who, account in (("GLEXEC", caller), ("TARGET", target)):
        known = {"USER": account.pw_name, "UID": str(account.pw_uid), "GID": str(account.pw_gid)}
        environment |= {f"GLEXEC_EPILOG_{who}_{key}": value for key, value in known.items()}
    null = subprocess.DEVNULL
    try:
        program = subprocess.Popen([conf.epilogue], env=environment, cwd="/", stdin=null, stdout=null, stderr=null)
        try:
            ended = program.wait(conf.epilogue_timeout)
        except subprocess.TimeoutExpired:
            program.terminate()
            try:
                program.wait(_GRACE)
            finally:
                program.kill()
                program.wait()
            raise Refusal(SYSTEM_ERROR, f"the epilogue took longer than {conf.epilogue_timeout} s") from None
    except OSError as error:
        raise Refusal(SYSTEM_ERROR, f"epilogue: {conf.epilogue}: {error.strerror}") from error
    if ended != 0:
        raise Refusal(SYSTEM_ERROR, f"the epilogue {conf.epilogue} ended with {ended}")


def _directories(path: str) -> list[str]:
    parts = path.split("/")[1:-1]
    return ["/", *("/" + "/".join(parts[: count + 1]) for count in range(len(parts)))]
