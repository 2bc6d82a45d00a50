"""First on the path of every Python in the fake's environment: Python imports it when it starts."""

import os

if "MIRAI_FAKE_LIBRARY" in os.environ:
    from tests.gpu.rehearsal.install import install_in_this_process

    install_in_this_process()
