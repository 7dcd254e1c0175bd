"""The paper's tables and figures as one report: plan the runs, train what is missing, compare, render."""
