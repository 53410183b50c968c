// Package term is how the command line shows things to people: tables, fields and
// the progress of steps.
//
// On a terminal it draws tables with borders, colours and a line that counts while a
// step lasts; elsewhere (a pipe, a file, CI) it writes plain columns and one line at
// the begin and end of each step. NO_COLOR (https://no-color.org) and TERM=dumb turn
// colours off. Text that comes from VMs, hosts or the network passes [Clean], so that
// no one can steer the reader's terminal.
package term

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"unicode"

	"charm.land/lipgloss/v2"
	"charm.land/lipgloss/v2/table"
	"golang.org/x/sys/unix"
)

// Out writes to one stream.
type Out struct {
	w     io.Writer
	tty   bool
	color bool
}

// New looks at the stream and the environment.
func New(w io.Writer) *Out {
	tty := IsTerminal(w) && os.Getenv("TERM") != "dumb"
	return &Out{w: w, tty: tty, color: tty && os.Getenv("NO_COLOR") == ""}
}

// IsTerminal reports whether the stream is a terminal.
func IsTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Line writes one line.
func (o *Out) Line(format string, args ...any) {
	fmt.Fprintf(o.w, format+"\n", args...)
}

// Tone is how a text is meant.
type Tone int

// The tones.
const (
	Plain Tone = iota
	Good
	Bad
	Busy
	Faint
	Strong
)

// Paint colours a text if the stream shows colours.
func (o *Out) Paint(t Tone, text string) string {
	if !o.color {
		return text
	}
	s := lipgloss.NewStyle()
	switch t {
	case Good:
		s = s.Foreground(lipgloss.Green)
	case Bad:
		s = s.Foreground(lipgloss.Red).Bold(true)
	case Busy:
		s = s.Foreground(lipgloss.Yellow)
	case Faint:
		s = s.Faint(true)
	case Strong:
		s = s.Bold(true)
	default:
		return text
	}
	return s.Render(text)
}

// Table writes rows under a header.
func (o *Out) Table(header []string, rows [][]string) {
	if !o.tty {
		tw := tabwriter.NewWriter(o.w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, strings.ToUpper(strings.Join(header, "\t")))
		for _, r := range rows {
			fmt.Fprintln(tw, strings.Join(r, "\t"))
		}
		tw.Flush()
		return
	}
	cell := lipgloss.NewStyle().Padding(0, 1)
	head := cell.Bold(o.color)
	border := lipgloss.NewStyle().Faint(o.color)
	t := table.New().Headers(header...).Rows(rows...).Border(lipgloss.RoundedBorder()).BorderStyle(border).
		StyleFunc(func(row, _ int) lipgloss.Style {
			if row == table.HeaderRow {
				return head
			}
			return cell
		})
	fmt.Fprintln(o.w, t.Render())
}

// Field is one line of a listing of one thing.
type Field struct{ Name, Value string }

// Fields writes the fields that have a value, aligned.
func (o *Out) Fields(fields ...Field) {
	width := 0
	for _, f := range fields {
		if f.Value != "" {
			width = max(width, len(f.Name))
		}
	}
	for _, f := range fields {
		if f.Value != "" {
			o.Line("%s  %s", o.Paint(Faint, fmt.Sprintf("%-*s", width, f.Name)), f.Value)
		}
	}
}

// Clean removes what could steer a terminal: control characters but newline and tab,
// and formatting characters such as bidirectional overrides.
func Clean(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return r
		case r == unicode.ReplacementChar, unicode.IsControl(r), unicode.Is(unicode.Cf, r):
			return -1
		}
		return r
	}, text)
}

// Cleaner passes what is written through [Clean]. It may drop a character that is cut
// by two writes.
type Cleaner struct{ W io.Writer }

func (c Cleaner) Write(p []byte) (int, error) {
	if _, err := io.WriteString(c.W, Clean(strings.ToValidUTF8(string(p), ""))); err != nil {
		return 0, err
	}
	return len(p), nil
}
