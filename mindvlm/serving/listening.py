"""The socket of the server, bound before anything slow."""

import errno
import socket

from mindvlm.core.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
        UserError: the host name is unknown, the port is in use, or the host or port is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: expected 0 to 65535 (0: any free port)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends the pieces of a stream without delay only if the protocol is given
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except (socket.gaierror, UnicodeError):  # UnicodeError: a name that no host can have
        raise UserError(f"cannot listen on {host}:{port}: the host name is unknown; choose another --host") from None
    except OSError as error:
        remedy = "choose another --host or --port"
        if error.errno == errno.EADDRINUSE:
            remedy = "end the program that uses it, or choose another --port"
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    return bound
