"""The HTML page: what stands where (Jinja), and how it looks. It needs no script and nothing from outside."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --faint: #5d6570; --paper: #fdfdfb; --card: #f3f3ef; --line: #d8d8d2;
  --accent: #0072b2; --mark: #ffe3a6; --good: #1c7a4d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --faint: #9aa3b0; --paper: #14161c; --card: #1d2028; --line: #3a3f4a; --accent: #6cbcf0;
    --mark: #6b4d00; --good: #5fcf97; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 160rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 2vw, 3rem) 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: var(--accent); }
nav a { margin-right: 1rem; }
.headline { font-size: 1.1rem; max-width: 90rem; }
.warning { border-left: 4px solid #d55e00; padding: .25rem .75rem; background: var(--card); }
.note { color: var(--faint); font-size: .85rem; margin: .5rem 0; }
.notes { columns: 34rem; column-gap: 2rem; width: 0; min-width: 100%; }
.notes .note { break-inside: avoid; margin: 0; padding: .25rem 0; }
.plots { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
.plots > * { min-width: 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.tables > * { min-width: min(100%, 24rem); max-width: 100%; }
.tables > :first-child { flex-basis: 100%; }
.tables > :first-child table { width: 100%; }
dl { columns: 28rem; column-gap: 2rem; font-size: .85rem; margin: .5rem 0; }
dl div { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 0 1rem; break-inside: avoid; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; min-width: 4rem; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 36rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0;
  white-space: nowrap; max-width: 14rem; overflow: hidden; text-overflow: ellipsis; }
td small { display: block; color: var(--faint); font-size: .72rem; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; fill: currentColor; }
figcaption { color: var(--faint); font-size: .85rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.sample { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 1.5rem; }
@media (min-width: 60rem) { .sample.pictured { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
.sample img { width: 100%; height: auto; border-radius: .3rem; display: block; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: .3rem;
  margin: 0 0 .8rem; padding: .5rem .7rem; }
.by { font-size: .85rem; color: var(--faint); margin: 0 0 .2rem; }
.same { color: var(--good); }
.by b { color: var(--ink); }
mark { background: var(--mark); color: inherit; border-radius: .15rem; }
@media print { details { break-inside: avoid; } .wide { overflow: visible; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="specvlm report">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{%- macro table(found) %}
<div>
<h3>{{ found.title }}</h3>
{%- if found.rows %}
<div class="wide">
<table>
<thead><tr>
{%- for column in found.columns %}<th scope="col"{% if not column.form %} class="text"{% endif %}>{{ column.name }}</th>
{%- endfor %}</tr></thead>
<tbody>
{%- for row in found.texts %}
<tr>
{%- for cell in row %}<td{% if not found.columns[loop.index0].form %} class="text"{% endif %}>{{ cell.value }}
{%- if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- endif %}
<div class="notes">
{%- for note in found.notes %}
<p class="note">{{ note }}</p>
{%- endfor %}
</div>
</div>
{%- endmacro %}
{%- if runs | length > 1 %}
<nav>
{%- for run in runs %}
<a href="#run-{{ loop.index }}">{{ run.name }}</a>
{%- endfor %}
<a href="#compared">compared</a>
</nav>
{%- endif %}
{%- for run in runs %}
<section id="run-{{ loop.index }}">
{%- if runs | length > 1 %}
<h2>{{ run.name }}</h2>
{%- endif %}
<p class="headline">{{ run.headline }}</p>
{%- if run.progress %}
<p class="warning">{{ run.progress }}</p>
{%- endif %}
<div class="plots">
{%- for drawing in run.drawings if drawing.svg %}
<figure><div class="wide">{{ drawing.svg }}</div><figcaption>{{ drawing.note }}</figcaption></figure>
{%- endfor %}
</div>
{%- for drawing in run.drawings if not drawing.svg %}
<p class="note">{{ drawing.title }} is left out. {{ drawing.note }}</p>
{%- endfor %}
<div class="tables">
{%- for found in run.tables %}
{{- table(found) }}
{%- endfor %}
</div>
<h3>The run</h3>
<dl>
{%- for name, value in run.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
<h3>Samples</h3>
{%- if run.samples_note %}
<p class="note">{{ run.samples_note }}</p>
{%- endif %}
{%- for sample in run.samples %}
<details{% if loop.first %} open{% endif %}>
<summary>{{ sample.name }}: {{ sample.prompt }}</summary>
<p class="note">{{ sample.about }}</p>
<div class="sample{% if sample.pictures %} pictured{% endif %}">
<div>
{%- for answer in sample.answers %}
<p class="by"><b>{{ answer.method }}</b>{% if answer.same %}: <span class="same">{{ answer.same }}</span>{% endif -%}
, {{ answer.account }}</p>
{%- if not answer.same %}
<p class="answer">
{%- for text, is_other in answer.pieces %}{% if is_other %}<mark>{{ text }}</mark>{% else %}{{ text }}{% endif %}
{%- endfor %}</p>
{%- endif %}
{%- endfor %}
</div>
{%- if sample.pictures %}
<div>
{%- for picture in sample.pictures %}
{%- if picture.data %}
<figure><img src="{{ picture.data }}" alt="what was kept">
<figcaption>{{ picture.caption }}</figcaption></figure>
{%- else %}
<p class="note">{{ picture.caption }}</p>
{%- endif %}
{%- endfor %}
</div>
{%- endif %}
</div>
</details>
{%- endfor %}
</section>
{%- endfor %}
{%- if comparisons %}
<section id="compared">
<h2>Compared</h2>
<div class="tables">
{%- for found in comparisons %}
{{- table(found) }}
{%- endfor %}
</div>
</section>
{%- endif %}
</main>
</body>
</html>
"""
