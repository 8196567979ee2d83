import subprocess
import sys

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"flwr", "ray"} or name.startswith(
            ("fedpriv.federation", "fedpriv.models", "fedpriv.training", "fedpriv.data")
        ):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
from fedpriv.privacy import *
from fedpriv.privacy import PoissonSampling, GaussianMechanism, GlobalClipping, RdpAccountant
sampling = PoissonSampling(1000, 10.0)
accountant = RdpAccountant(sampling.adjacency)
accountant.compose(sampling.event(GaussianMechanism(1.0, GlobalClipping(1.0))), 1000)
print(accountant.epsilon(1e-5))
"""


def test_the_accountants_work_without_flower_ray_or_models():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 2.101367) < 1e-6
