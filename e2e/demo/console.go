package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// console prints the story: steps with the seconds since the start, and facts below them.
type console struct {
	w     io.Writer
	start time.Time
	color bool
}

func newConsole(f *os.File) *console {
	st, err := f.Stat()
	return &console{w: f, start: time.Now(), color: err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""}
}

func (c *console) paint(code, s string) string {
	if !c.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// step begins a new part of the story.
func (c *console) step(format string, args ...any) {
	fmt.Fprintf(c.w, "\n%6.1fs  %s\n", time.Since(c.start).Seconds(), c.paint("1", fmt.Sprintf(format, args...)))
}

// fact tells something that was seen.
func (c *console) fact(format string, args ...any) {
	c.lines(c.paint("32", "✓")+" ", fmt.Sprintf(format, args...))
}

// show prints what a command printed.
func (c *console) show(title, text string) {
	fmt.Fprintf(c.w, "         %s\n", c.paint("36", "$ "+title))
	c.lines("  ", text)
}

func (c *console) lines(mark, text string) {
	for line := range strings.Lines(strings.TrimRight(text, "\n")) {
		fmt.Fprintf(c.w, "         %s%s\n", mark, strings.TrimRight(line, "\n"))
		mark = "  "
	}
}

func (c *console) fail(err error) {
	fmt.Fprintf(c.w, "\n%6.1fs  %s %v\n", time.Since(c.start).Seconds(), c.paint("1;31", "FAILED:"), err)
}
