"""The page's style: light, dark and on paper."""

# Okabe and Ito's palette, told apart with every kind of colour vision; the darkest one turns light on dark ground.
STYLE = """
:root{--ink:#1a1a1a;--soft:#5c5c5c;--paper:#fff;--rule:#d5d5d5;--tint:#f4f4f4;--s0:#0072B2;--s1:#D55E00;--s2:#009E73;
--s3:#CC79A7;--s4:#56B4E9;--s5:#E69F00;--s6:#8a7d00;--s7:#000}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a5a5a5;--paper:#161616;--rule:#3c3c3c;
--tint:#232323;--s0:#4aa8de;--s6:#F0E442;--s7:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 8px}
h2{font-size:19px;margin:36px 0 4px;padding-top:12px;border-top:1px solid var(--rule)}
p{max-width:80ch;margin:6px 0 12px}
.notes{border-left:3px solid var(--s1);padding:4px 0 4px 12px;margin:12px 0}
.notes ul{margin:4px 0;padding-left:20px}
.scroll{overflow-x:auto;margin:14px 0 22px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;border-bottom:1px solid var(--ink)}
caption{text-align:left;padding:0 0 6px;font-size:14px}
th,td{padding:3px 9px;text-align:right;vertical-align:bottom;white-space:nowrap}
thead th{white-space:normal;font-weight:600;min-width:4em;border-bottom:1px solid var(--rule)}
thead tr:first-child th{border-top:1px solid var(--ink)}
thead small{display:block;font-weight:400;color:var(--soft)}
tbody th{font-weight:400}
tbody tr:nth-child(even){background:var(--tint)}
th.group{font-weight:600;padding-top:10px;background:var(--paper)}
.text,tbody th{text-align:left}
td.text{white-space:normal;max-width:28em;overflow-wrap:break-word}
.best{font-weight:700}
.diff{color:var(--soft)}
.figures{display:flex;flex-wrap:wrap;gap:22px 20px}
.charts{display:flex;flex-wrap:wrap;gap:4px}
figure{margin:0}
figure.wide{width:100%;margin:16px 0 24px}
figcaption{font-size:13px;margin-bottom:4px}
svg text{font-size:11px;fill:var(--ink)}
svg.chart{width:290px;height:225px}
svg.bars{width:100%;max-width:700px;height:auto}
svg.chart,svg.bars{display:block}
.mid{text-anchor:middle}
.end{text-anchor:end}
svg text.dark{fill:#000}
svg text.light{fill:#fff}
.grid{stroke:var(--rule)}
.s0{fill:var(--s0);stroke:var(--s0)}.s1{fill:var(--s1);stroke:var(--s1)}.s2{fill:var(--s2);stroke:var(--s2)}
.s3{fill:var(--s3);stroke:var(--s3)}.s4{fill:var(--s4);stroke:var(--s4)}.s5{fill:var(--s5);stroke:var(--s5)}
.s6{fill:var(--s6);stroke:var(--s6)}.s7{fill:var(--s7);stroke:var(--s7)}
.line{fill:none;stroke-width:1.5}
.legend{max-width:none;margin:4px 0 8px}
.key{display:inline-block;margin-right:18px;font-size:13px}
.key svg{vertical-align:-2px;margin-right:5px}
.tiles{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-start}
.maps{margin-top:10px}
.tile{font-size:12px}
.tile img{display:block;margin-bottom:3px}
.tile span{display:block;max-width:192px}
.pixels{image-rendering:pixelated}
@media print{body{font-size:11px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}
.scroll{overflow:visible}table{font-size:8px}th,td{padding:2px 4px}caption{font-size:11px}
.tile img{width:auto;height:96px}.tile span{max-width:110px}figure,tr{break-inside:avoid}h2,caption{break-after:avoid}}
"""
