"""What a cut of power leaves of a directory, by a model of a disk, and of a real file system."""

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

SHUTDOWN = 0x8004587D  # ext4's and XFS's, as xfstests has it
WITHOUT_LOG = struct.pack("I", 2)


class Disk:
    """A directory on a disk that keeps what was synced, and of the rest what chance has it.

    A file is what it was when it was synced, or as it is now, or what is new of it is missing,
    torn or of zeros. A name is there as it was when its directory was synced, or as it is now.
    """

    def __init__(self, root, shadow, draw):
        self.root, self._shadow, self._draw = root, shadow, draw
        self._names = {}
        self._bytes = {}
        shadow.mkdir()
        self.note(root)

    def note(self, path):
        """Note that a path was synced."""
        if path.is_dir():
            self._names[path.stat().st_ino] = self._listed(path)
            return
        inode = path.stat().st_ino
        self._bytes[inode] = path.read_bytes()
        self._keep(path)

    def _listed(self, directory):
        return {each.name: (each.stat().st_ino, each.is_dir()) for each in directory.iterdir()}

    def _keep(self, path):
        """Keep an inode from being used again."""
        kept = self._shadow / str(path.stat().st_ino)
        if not kept.exists():
            os.link(path, kept)

    def cut(self, to):
        """Write what is left to another directory."""
        self._write(self.root, self.root.stat().st_ino, to)

    def _write(self, here, inode, to):
        to.mkdir()
        was = self._names.get(inode, {})
        now = self._listed(here) if here is not None and here.exists() else {}
        for name in sorted({*was, *now}):
            found = self._draw.choice([was.get(name), now.get(name)])
            if found is None:
                continue
            number, is_directory = found
            current = here / name if here is not None and now.get(name) == found else None
            if is_directory:
                self._write(current, number, to / name)
            else:
                (to / name).write_bytes(self._content(current, number))

    def _content(self, current, inode):
        synced = self._bytes.get(inode)
        now = current.read_bytes() if current is not None else b""
        if current is not None and now == synced:
            return now
        kept = synced if synced is not None and now.startswith(synced) else b""
        new = now[len(kept) :]
        torn = [new, b"", new[: len(new) // 2], bytes(len(new)), new[:-9] + bytes(9)]
        choices = [kept + each for each in torn]
        return self._draw.choice(choices if synced is None else [synced, *choices])


class Image:
    """An ext4 file system in a file, which is cut off as by a loss of power.

    It takes root, loop devices and a mount namespace of one's own: run under `unshare --mount`.
    """

    def __init__(self, where: Path):
        self._where = where
        self._number = 0
        self._file = where / "0.img"
        with self._file.open("wb") as image:
            image.truncate(2**26)
        _run("mkfs.ext4", "-q", "-F", self._file)
        self._mount()

    def _mount(self):
        self.root = self._where / f"mounted{self._number}"
        self.root.mkdir()
        # What is not synced reaches the journal every second, as after longer waits elsewhere.
        _run("mount", "-o", "loop,commit=1", self._file, self.root)

    def cut(self):
        """Lose all that is not on the disk, and mount what is left of it."""
        opened = os.open(self.root, os.O_RDONLY)
        fcntl.ioctl(opened, SHUTDOWN, WITHOUT_LOG)
        os.close(opened)

    def power_on(self):
        """Mount what a cut left."""
        self._number += 1
        left = self._where / f"{self._number}.img"
        _run("cp", "--sparse=always", self._file, left)
        self.close()
        self._file.unlink()
        self._file = left
        self._mount()

    def close(self):
        _run("umount", "--lazy", self.root)


def _run(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True)


def has_images():
    """Whether file systems can be mounted here."""
    if os.name == "nt" or os.geteuid() or shutil.which("unshare") is None:
        return False
    probe = "mount -t tmpfs none /mnt && test -e /dev/loop-control && command -v mkfs.ext4"
    ran = subprocess.run(
        [shutil.which("unshare"), "--mount", "sh", "-c", probe], check=False, capture_output=True
    )
    return not ran.returncode
