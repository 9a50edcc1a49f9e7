"""Python imports this at start where PYTHONPATH names its directory: engine actors get the stub.

Ray runs a worker_process_setup_hook only when it belongs to the driver's own runtime environment,
and an application's is not.
"""

from benchmarks.stub_executor import install

install()
