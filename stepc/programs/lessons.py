"""What `--help` teaches of each command: examples that can be copied, and exit codes. Text only."""

from types import MappingProxyType

_BUILD = """\
in a file train.py of yours:

  def build(mesh):
      step = stepc.compile(pipeline, mesh=mesh)
      return step, step.init(params), batch  # of jax.ShapeDtypeStruct leaves as well: nothing is run
"""

LESSONS = MappingProxyType(
    {
        "train": """\
examples:
  stepc train                                 # about two minutes on two cores
  stepc train --steps 100 --k 8 --batch 32    # eight microbatches in one step, on two simulated devices

exit codes: 0 if all went well, 1 if what it needs is not installed, 2 for a mistake in the command, 130 for Ctrl-C.""",
        "launch": """\
examples:
  stepc launch -n 4 -- stepc train                        # four processes, each with its own part of every batch
  stepc launch -n 2 -- python train.py                    # your own program, which calls sc.init_distributed()

exit codes: 0 if all went well, else that of the first process that failed; 2 for a mistake in the command.""",
        "explain": f"""\
{_BUILD}
examples:
  stepc explain train.py:build --mesh data=8
  stepc explain train.py:build --on tpu:v5e:16x16 --mesh data=64,model=4
  stepc explain --jit my_module:train_step --args example_args

exit codes: 0 if all went well, 1 if nothing fits the memory it asks for, 2 for a mistake in the command.""",
        "report": f"""\
{_BUILD}
examples:
  stepc report train.py:build --mesh data=8 -o step.html
  stepc report train.py:build --on gpu:h100:32x8 --device gpu:h100 -o pod.html

exit codes: 0 if all went well, 1 if nothing fits the memory it asks for, 2 for a mistake in the command.""",
        "check": f"""\
{_BUILD}
in a file budget.toml:

  gradient_reductions = 1
  collectives_in_loops = 0
  temp_bytes = "2GiB"
  donated = true

examples:
  stepc check train.py:build --mesh data=8 --budget budget.toml
  stepc check train.py:build --on tpu:v5e:16x16 --budget budget.toml

exit codes: 0 if every promise holds, 1 if one is broken, 2 for a mistake in the command.""",
        "diff": f"""\
{_BUILD}
examples:
  stepc diff old.py:build new.py:build --mesh data=8
  stepc diff before.hlo after.hlo             # what `compiled.hlo()` returned, kept in files

exit codes: 0 if nothing changed, 1 if something did, 2 for a mistake in the command.""",
    }
)
