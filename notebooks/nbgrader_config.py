"""For instructors: copy this file into your nbgrader course folder (extra `grading`, see docs of nbgrader).

1. Put `notebooks/homework/NAME.ipynb`, the unsolved notebook, into `source/HOMEWORK/` of the course folder.
2. `nbgrader generate_assignment HOMEWORK` fills the gradebook; hand out the notebook from `release/HOMEWORK/`.
3. Put what students hand in into `downloaded/HOMEWORK/archive/`, as HOMEWORK_STUDENT_attempt_DATE_NAME.ipynb.
4. `nbgrader zip_collect HOMEWORK`, `nbgrader autograde HOMEWORK --create`, `nbgrader export`.

The environment of this course must be active: nbgrader calls its own programs by name, and the check cells
import `effnlp_lessons`.
"""

c = get_config()  # noqa: F821  (given by nbgrader)

# The notebooks are unsolved already. Left on, this step would also replace the buggy starters by blanks.
c.ClearSolutions.enabled = False

c.FileNameCollectorPlugin.named_regexp = r".*_(?P<student_id>\w+)_attempt_(?P<timestamp>[0-9\-]+)_(?P<file_id>\w+)"
