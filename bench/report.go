package main

import (
	"bytes"
	"debug/buildinfo"
	_ "embed" // the template
	"fmt"
	"html/template"
	"image/color"
	"math"
	"regexp"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

//go:embed report.html.tmpl
var reportText string

var reportTemplate = template.Must(template.New("report").Funcs(template.FuncMap{
	"figure": figure, "percent": percent, "mib": mib, "ratio": ratioText, "micro": func(seconds float64) string { return figure(1e6 * seconds) }, "spread": spreadText, "class": class, "cell": func(w Workload, s string) Cell { return w.cell(s) },
}).Parse(reportText))

// groups are the tables and charts, in the order of the report.
var groups = []struct{ Name, Title string }{
	{"fio", "Data: fio"},
	{"metadata", "Metadata: 10,000 files in 100 directories"},
	{"jobs", "Whole jobs"},
	{"gate", "A volume with little room"},
}

// colours are told apart also by who does not see colours well (Okabe and Ito).
var colours = []color.RGBA{
	{0x99, 0x99, 0x99, 255}, {0xe6, 0x9f, 0x00, 255}, {0x00, 0x72, 0xb2, 255}, {0x00, 0x9e, 0x73, 255}, {0xcc, 0x79, 0xa7, 255}, {0xd5, 0x5e, 0x00, 255},
}

func renderReport(r *Result) ([]byte, error) {
	type section struct {
		Title     string
		Workloads []Workload
		Chart     template.HTML
	}
	view := struct {
		*Result
		Sections []section
		Chart    template.HTML // of memory
	}{Result: r}
	for _, g := range groups {
		s := section{Title: g.Title, Workloads: r.group(g.Name)}
		if len(s.Workloads) == 0 {
			continue
		}
		var err error
		if s.Chart, err = ratioChart(r.Systems, s.Workloads); err != nil {
			return nil, err
		}
		view.Sections = append(view.Sections, s)
	}
	if len(r.Memory) > 0 {
		var err error
		if view.Chart, err = memoryChart(r.Memory); err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	err := reportTemplate.Execute(&b, view)
	return b.Bytes(), err
}

func (r *Result) group(name string) []Workload {
	var list []Workload
	for _, w := range r.Workloads {
		if w.Group == name {
			list = append(list, w)
		}
	}
	return list
}

// ratioChart has a row for each workload, the first at the top, and in it a bar for each
// system but native, which is the line at 1.
func ratioChart(systems []Shown, workloads []Workload) (template.HTML, error) {
	p := newPlot()
	p.X.Label.Text = "ratio to native: 1 is as fast, longer is better"
	p.X.Min, p.X.Max = 0, 1.25
	p.Legend.Top, p.Legend.Left, p.Legend.YOffs = true, true, vg.Points(-2)
	p.Legend.Padding = vg.Points(3)
	var names []string
	for i := range workloads {
		w := &workloads[len(workloads)-1-i]
		title := w.Title
		if w.Noisy {
			title += " (noisy)"
		}
		names = append(names, title)
	}
	var others []Shown
	for _, s := range systems {
		if s.Name != native {
			others = append(others, s)
		}
	}
	width := vg.Points(7)
	for i, s := range others {
		values := make(plotter.Values, len(workloads))
		for j := range workloads {
			// Some are far beyond: the chart is about what is lost, the table has the figure.
			values[j] = min(workloads[len(workloads)-1-j].cell(s.Name).Ratio, 1.25)
		}
		bars, err := plotter.NewBarChart(values, width)
		if err != nil {
			return "", err
		}
		bars.Horizontal = true
		bars.LineStyle.Width = 0
		bars.Color = colours[i%len(colours)]
		bars.Offset = width * vg.Length(float64(len(others)-1)/2-float64(i))
		p.Add(bars)
		p.Legend.Add(s.Name, bars)
	}
	line, err := plotter.NewLine(plotter.XYs{{X: 1, Y: -0.6}, {X: 1, Y: float64(len(names)) - 0.4}})
	if err != nil {
		return "", err
	}
	line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
	p.Add(line)
	p.Legend.Add(native, line)
	p.NominalY(names...)
	p.X.Tick.Marker = plot.TickerFunc(func(float64, float64) []plot.Tick {
		var ticks []plot.Tick
		for v := 0.0; v < 1.3; v += 0.25 {
			ticks = append(ticks, plot.Tick{Value: v, Label: fmt.Sprintf("%g", v)})
		}
		return ticks
	})
	p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = 0, 1.3, -0.6, float64(len(names))-0.4
	// The legend gets rows of its own above those of the workloads.
	row := width*vg.Length(len(others)) + vg.Points(10)
	legend := float64(vg.Points(18)*vg.Length(len(others)+1)) / float64(row)
	p.Y.Max += legend
	height := row*vg.Length(float64(len(names))+legend) + vg.Points(50)
	return svg(p, vg.Points(720), height)
}

// memoryChart has a bar for each situation.
func memoryChart(memory []Memory) (template.HTML, error) {
	p := newPlot()
	p.X.Label.Text = "resident memory of the daemon, MiB"
	var values plotter.Values
	var names []string
	for i := range memory {
		m := memory[len(memory)-1-i]
		values, names = append(values, float64(m.RSS)/(1<<20)), append(names, m.Situation)
	}
	bars, err := plotter.NewBarChart(values, vg.Points(14))
	if err != nil {
		return "", err
	}
	bars.Horizontal, bars.Color = true, colours[2]
	bars.LineStyle.Width = 0
	p.Add(bars)
	p.NominalY(names...)
	p.X.Min, p.X.Max = 0, 1.05*p.X.Max
	p.Y.Min, p.Y.Max = -0.5, float64(len(names))-0.5
	return svg(p, vg.Points(720), vg.Points(60)+vg.Length(len(names))*vg.Points(26))
}

// newPlot is one whose font looks the same nearly everywhere: Arial has Liberation Sans'
// metrics.
func newPlot() *plot.Plot {
	p := plot.New()
	for _, style := range []*text.Style{&p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Variant, style.Font.Size = "Sans", vg.Points(11)
	}
	p.Y.Padding = vg.Points(8)
	return p
}

// textStyle matches the font that the library names in an SVG.
var textStyle = regexp.MustCompile(`font-family:[^;"]*;[^"]*font-size:[0-9.]+px`)

// svg draws the plot as an element to embed.
func svg(p *plot.Plot, width, height vg.Length) (template.HTML, error) {
	c := vgsvg.New(width, height)
	p.Draw(draw.New(c))
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return "", err
	}
	_, element, ok := strings.Cut(b.String(), "<svg")
	if !ok {
		return "", fmt.Errorf("the plotting library wrote no <svg>")
	}
	// The place that text gets was computed for one font; a little smaller, others fit as well.
	element = textStyle.ReplaceAllString(element, "font-family:'Liberation Sans',Arial,Helvetica,sans-serif;font-size:10px")
	return template.HTML("<svg" + element), nil //nolint:gosec // drawn by the library, which escapes text
}

// table is the report's tables in Markdown.
func (r *Result) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Ratio to native in the same round, medians of %d: 1.00 is as fast, less is slower. ± is (max-min)/median, of the ratios;\n"+
		"of native, of the samples.\n", r.Settings.Rounds)
	t := r.RoundTrip
	fmt.Fprintf(&b, "Two processes wake each other through a pipe in %s µs ±%s: \"bound\" is native and that for each request waited for. After a\n"+
		"millisecond of rest they take %s µs ±%s.\n", figure(1e6*t.Median), percent(t.Spread), figure(1e6*t.RestedMedian), percent(t.RestedSpread))
	fmt.Fprintf(&b, "Kernel %s, %s, %d CPUs, %s. This run is: %s.\n", r.Host.Kernel, r.Settings.FS, r.Host.CPUs, r.Date.Format("2006-01-02"), r.Status)
	for _, g := range groups {
		workloads := r.group(g.Name)
		if len(workloads) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n### %s\n\n| | native |", g.Title)
		rule := "\n|---|---:|"
		for _, s := range r.Systems {
			if s.Name != native {
				fmt.Fprintf(&b, " %s |", s.Name)
				rule += "---:|"
			}
		}
		b.WriteString(rule + "\n")
		for _, w := range workloads {
			base, title := w.cell(native), w.Title
			if w.Noisy {
				title += " **noisy**"
			}
			fmt.Fprintf(&b, "| %s | %s %s ±%s |", title, figure(base.Median), w.Unit, percent(base.Spread))
			for _, s := range r.Systems {
				if s.Name == native {
					continue
				}
				c := w.cell(s.Name)
				if c.Error != "" {
					b.WriteString(" failed |")
					continue
				}
				fmt.Fprintf(&b, " %s |", strings.TrimSpace(ratioText(c.Ratio)+" "+spreadText(c)+boundText(c)))
			}
			b.WriteByte('\n')
		}
	}
	if len(r.Gate) > 0 {
		b.WriteString("\n### The gate\n\n| | |\n|---|---:|\n")
		for _, f := range r.Gate {
			if f.Error != "" {
				fmt.Fprintf(&b, "| %s | failed |\n", f.Title)
				continue
			}
			fmt.Fprintf(&b, "| %s | %s %s |\n", f.Title, figure(f.Value), f.Unit)
		}
	}
	if len(r.Memory) > 0 {
		b.WriteString("\n### Memory of the daemon\n\n| | RSS, MiB | anonymous, MiB | bytes an inode |\n|---|---:|---:|---:|\n")
		for _, m := range r.Memory {
			fmt.Fprintf(&b, "| %s: %s | %s | %s | %s |\n", m.System, m.Situation, mib(m.RSS), mib(m.Anonymous), perInode(m.PerInode))
		}
	}
	return b.String()
}

// figure is a number with as many digits as it is good for.
func figure(v float64) string {
	switch {
	case v >= 1000:
		digits := fmt.Sprintf("%.0f", v)
		for i := len(digits) - 3; i > 0; i -= 3 {
			digits = digits[:i] + "," + digits[i:]
		}
		return digits
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func ratioText(v float64) string {
	switch {
	case v == 0:
		return "–"
	case v < 0.1:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func percent(v float64) string { return fmt.Sprintf("%.0f%%", 100*v) }

// spreadText is empty where there is one sample.
func spreadText(c Cell) string {
	if len(c.Samples) < 2 {
		return ""
	}
	return "±" + percent(c.Spread)
}

// boundText is empty where there is none.
func boundText(c Cell) string {
	if c.Bound == 0 {
		return ""
	}
	return ", bound " + ratioText(c.Bound)
}

func mib(v int64) string { return fmt.Sprintf("%.1f", float64(v)/(1<<20)) }

func perInode(v float64) string {
	if v == 0 {
		return "–"
	}
	return fmt.Sprintf("%.0f", math.Round(v))
}

// class is how a ratio looks in the report.
func class(ratio float64) string {
	switch {
	case ratio == 0:
		return ""
	case ratio >= 0.9:
		return "good"
	case ratio >= 0.5:
		return "fair"
	}
	return "poor"
}

// goFuseVersion is the module version that a program was built with.
func goFuseVersion(program string) string {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "unknown"
	}
	for _, dep := range append(info.Deps, &info.Main) {
		if dep.Path == "github.com/hanwen/go-fuse/v2" {
			return dep.Version
		}
	}
	return "unknown"
}
