"""A process that talks to a router like a replica, without a model: `python fake_replica.py SOCKET`.

The config path is the name of its model, and says what it does:
    problem     reports a problem and ends
    gone        ends at once
    loading     is never ready
    dies        is ready, and ends when it is asked
    half        is ready, and ends in the middle of the second event of a stream
    deaf        is ready, and does not end on SIGTERM
"""

import json
import os
import pickle
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIGURES = """# HELP asked_total requests
# TYPE asked_total counter
asked_total{path="/a \\"b\\""} 2.0
# HELP seconds times
# TYPE seconds histogram
seconds_bucket{le="1.0"} 1.0
seconds_bucket{le="+Inf"} 2.0
seconds_count 2.0
seconds_sum 3.5
"""
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/metrics":
            self.answer(FIGURES.encode())
        else:
            self.answer({"data": [{"id": name}]}, 503 if behavior == "loading" else 200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if behavior == "dies":
            os._exit(3)
        if behavior == "half":
            event = b'data: {"choices": []}\n\ndata: {"cho'
            self.wfile.write(HALF + b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(0.3)
            os._exit(3)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.answer({"pid": os.getpid(), "headers": headers, "path": self.path, "body": body.decode()}, 418)

    def answer(self, value, status=200):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def get_request(self):
        return self.socket.accept()[0], ("replica", 0)


plan = pickle.load(sys.stdin.buffer)
behavior = name = plan.config_path
if behavior == "gone":
    sys.exit(4)
if behavior == "problem":
    print(json.dumps({"problem": "config problem.yaml is wrong; correct it"}), flush=True)
    sys.exit(2)
if behavior == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = Server(("", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever()
