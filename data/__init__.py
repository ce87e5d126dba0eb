"""Documents to sequences to steps. Ranks are ints here: no process group is known."""

from ringctx.data.check import check_dataset
from ringctx.data.documents import Dataset, Documents, open_dataset
from ringctx.data.importers import ImportReport, import_dataset
from ringctx.data.ingest import BuildReport, build_dataset
from ringctx.data.joined import JoinedDataset, open_datasets
from ringctx.data.loader import Loader, Microbatch, RowShard
from ringctx.data.plan import Plan
from ringctx.data.steps import Step
from ringctx.data.summary import PlanSummary

__all__ = [
    "BuildReport",
    "Dataset",
    "Documents",
    "ImportReport",
    "JoinedDataset",
    "Loader",
    "Microbatch",
    "Plan",
    "PlanSummary",
    "RowShard",
    "Step",
    "build_dataset",
    "check_dataset",
    "import_dataset",
    "open_dataset",
    "open_datasets",
]

if __name__ != "ringctx.data":
    raise ImportError(
        "this folder is the package ringctx.data: write 'import ringctx.data', not 'import data'"
    )
