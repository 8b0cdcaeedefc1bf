"""A real HTTP server in a thread that says what a test tells it to, and remembers what it was asked."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """One answer: JSON where `body` is no bytes."""

    def __init__(self, body, status=200, kind="application/json", delay_s=0.0):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.kind, self.delay_s = status, kind, delay_s


class Server:
    """`answer(path, payload) -> Reply`; `asked` is a list of (path, payload)."""

    def __init__(self, answer):
        asked, lock = [], threading.Lock()
        self.asked = asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    asked.append((self.path, payload))
                reply = answer(self.path, payload)
                time.sleep(reply.delay_s)
                with contextlib.suppress(OSError):  # the client did not wait
                    self.send_response(reply.status)
                    self.send_header("content-type", reply.kind)
                    self.send_header("content-length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def in_turn(*replies):
    """Answers one after the other, the last one for ever."""
    left = list(replies)
    return lambda path, payload: left.pop(0) if len(left) > 1 else left[0]


def nobody_there():
    """A URL that refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"
