"""The style sheet of report.html; both colour schemes, no outside resource."""

# ruff: noqa: E501

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1e2630; --soft: #5c6875; --line: #dfe4ea;
  --good: #11794f; --good-fill: #e2f4ec; --bad: #b3261e; --bad-fill: #fdeceb; --code: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1d232a; --ink: #e7ebf0; --soft: #9aa7b4;
  --line: #323b45; --good: #63d3a2; --good-fill: #17362a; --bad: #ff9c94; --bad-fill: #42211f; --code: #262e37; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 19px; margin: 34px 0 12px; }
h3 { font-size: 17px; margin: 0; } p { margin: 0 0 10px; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table { font-size: 14.5px; } th, td { padding: 8px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child, .left { text-align: left; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 16px; }
.card { padding: 18px 20px; border-top: 4px solid var(--tenant); min-width: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; background: var(--tenant); margin-right: 8px; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.good { color: var(--good); background: var(--good-fill); } .bad { color: var(--bad); background: var(--bad-fill); }
dl { display: grid; grid-template-columns: auto 1fr; gap: 3px 14px; margin: 12px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.said { display: grid; grid-template-columns: 62px 1fr; gap: 6px 12px; margin: 12px 0 0; }
.said span { color: var(--soft); font-size: 13px; padding-top: 6px; }
.said q, pre { background: var(--code); border-radius: 7px; padding: 5px 11px; white-space: pre-wrap; overflow-wrap: anywhere;
  quotes: none; }
.said .after { border-left: 3px solid var(--tenant); } pre { padding: 12px 14px; margin: 8px 0 0; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Consolas, monospace; }
svg { display: block; width: 100%; height: auto; margin: 10px 0 0; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .each { fill: none; stroke: var(--tenant); stroke-width: 1; opacity: .5; }
.mean { fill: none; stroke: var(--tenant); stroke-width: 2.6; stroke-linejoin: round; }
.held { fill: var(--card); stroke: var(--ink); stroke-width: 1.6; }
.legend { font-size: 13px; color: var(--soft); }
"""
