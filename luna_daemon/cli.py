import sys, logging
from .daemon_server import LunaDaemon
def main(argv=None):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    LunaDaemon().run()
