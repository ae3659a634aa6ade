"""Downloads of pictures and documents from http and https addresses that the user names."""

from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from mindvlm.core.errors import UserError

TIMEOUT_SECONDS = 60
MAX_BYTES = 2**30
CHUNK = 2**20


def is_web_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def name_of(url: str) -> str:
    """Returns the file name in a URL."""
    return Path(unquote(urlsplit(url).path)).name.strip(".") or "page"


def download(url: str, folder: Path) -> Path:
    """Writes the content of a URL to a new file in a folder and returns its path.

    Raises:
        UserError: the server cannot be reached or refuses, or the content is longer than 1 GiB.
    """
    path = folder / f"{len(list(folder.iterdir()))}_{name_of(url)[-100:]}"
    try:
        with urlopen(Request(url, headers={"User-Agent": "mindvlm"}), timeout=TIMEOUT_SECONDS) as answer:
            with open(path, "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    if file.tell() > MAX_BYTES:
                        raise UserError(f"{url}: longer than 1 GiB; download it first and give the file")
    except HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        cause = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({cause}); check the address and the network") from None
    return path
