"""The look of `report.html`, light and dark."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--paper:#fff;--line:#dde1e6;--soft:#f5f7f9;--quiet:#5b6470;--trouble:#a33b00}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--paper:#14171b;--line:#31373f;--soft:#1c2025;--quiet:#9aa4af;--trouble:#ffa261}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:28px 18px 72px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.15rem;margin:0 0 8px}
section{margin-top:36px;padding-top:20px;border-top:1px solid var(--line)}
p{margin:.4em 0}
.quiet,small{color:var(--quiet);font-size:.88em}
.trouble{color:var(--trouble)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 20px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{font-weight:600;color:var(--quiet);font-size:.88em;vertical-align:bottom}
th:first-child{text-align:left}
.headline tbody tr:first-child>*{font-weight:600}
i{display:inline-block;width:.85em;height:.85em;border-radius:2px;border:1px solid var(--line);margin-right:.45em;vertical-align:-.06em}
@media(max-width:600px){th,td{padding-right:8px;font-size:.86em}thead th{overflow-wrap:normal}thead th,th:first-child{white-space:normal;min-width:8em}}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.88em;margin:8px 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:14px 20px;margin-top:8px}
.panels.half{grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));align-items:start;gap:20px 28px}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink)}
svg path[style*="#ffffff"]{fill:none!important}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:16px}
.tile{background:var(--soft);border-radius:6px;padding:8px 12px 12px}
.tile>div{display:grid;grid-template-columns:repeat(auto-fit,minmax(84px,1fr));gap:6px}
.tile img{width:100%;display:block;border-radius:3px}
figcaption{font-size:.8em;color:var(--quiet)}
.pairs{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:3px 20px;margin:0;font-size:.92em}
.pairs dt{font-weight:400;color:var(--quiet)}
.pairs dd{margin:0}
"""
"""CSS.  Text of figures takes the page's ink, their white ground the page's paper."""
