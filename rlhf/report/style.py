"""The page's style sheet. No colour carries meaning alone, nothing is fetched, and it prints."""

CSS = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --paper: #f8fafc; --card: #ffffff; --accent: #2563eb;
  --good: #047857; --bad: #b91c1c; --warn: #b45309; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 28px 80px; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 24px 0 8px; color: var(--soft); font-weight: 600; }
nav { position: sticky; top: 0; z-index: 2; background: rgba(248, 250, 252, 0.95);
  border-bottom: 1px solid var(--line); }
nav div { max-width: 1240px; margin: 0 auto; padding: 8px 28px; display: flex; gap: 18px; flex-wrap: wrap;
  font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px;
  margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pill { display: inline-block; border-radius: 999px; padding: 0 9px; font-size: 12.5px; line-height: 20px;
  background: #e2e8f0;
  color: #334155; white-space: nowrap; }
.pill.finished, .pill.pass { background: #d1fae5; color: #065f46; }
.pill.running { background: #dbeafe; color: #1e40af; }
.pill.failed, .pill.damaged, .pill.fail { background: #fee2e2; color: #991b1b; }
.pill.stopped, .pill.interrupted, .pill.unknown { background: #fef3c7; color: #92400e; }
ul.findings { list-style: none; margin: 0; padding: 0; }
ul.findings li { padding: 5px 0 5px 26px; position: relative; }
ul.findings li::before { content: "!"; position: absolute; left: 2px; top: 8px; width: 16px; height: 16px;
  border-radius: 50%;
  background: #fef3c7; color: var(--warn); font: bold 12px/16px system-ui, sans-serif; text-align: center; }
ul.findings li.bad::before { content: "×"; background: #fee2e2; color: var(--bad); }
.verdicts td:nth-child(-n+2) { width: 1%; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px 6px; }
figcaption { font-size: 13px; font-weight: 600; display: flex; justify-content: space-between; gap: 8px;
  margin-bottom: 4px; }
figcaption span { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
figure svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; }
.lineage svg { max-width: 100%; height: auto; display: block; }
.sample { display: grid; grid-template-columns: 1fr 1fr; gap: 0 18px; }
.sample .prompt { grid-column: 1 / -1; color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere;
  margin-bottom: 6px; }
.sample .answer { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line);
  padding-left: 10px; }
.sample .answer.after { border-left-color: var(--accent); }
.sample .step { font-size: 12.5px; color: var(--soft); padding-left: 13px; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { background: #f1f5f9; border-radius: 6px; padding: 10px 14px; font: 12.5px/1.45 ui-monospace, monospace;
  overflow-x: auto;
  margin: 8px 0; max-height: 480px; overflow-y: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) { .sample { grid-template-columns: 1fr; } .sample .answer.after { margin-top: 8px; } }
@media print { nav { display: none; } figure, .card { break-inside: avoid; } }
"""
