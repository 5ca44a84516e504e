package app

import (
	"io"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	logConsole = "console"
	logJSON    = "json"
)

// logOptions are the flags about a log.
type logOptions struct{ format, level *choice }

func newLogOptions() logOptions {
	return logOptions{format: newChoice(logConsole, logJSON), level: newChoice("info", "debug", "warn", "error")}
}

func (o logOptions) flags(cmd *cobra.Command) {
	o.format.flag(cmd, "log-format", "", "form of the log")
	o.level.flag(cmd, "log-level", "", "least level of what is logged")
}

func (o logOptions) args() []string {
	return []string{"--log-format=" + o.format.word, "--log-level=" + o.level.word}
}

func (o logOptions) logger(w io.Writer) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(o.level.word)
	if err != nil {
		return nil, err
	}
	return newLogger(w, o.format.word, level), nil
}

// newLogger returns a logger that writes lines of the format to w.
func newLogger(w io.Writer, format string, level zapcore.Level) *zap.Logger {
	c := zap.NewProductionEncoderConfig()
	c.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncodeDuration = zapcore.StringDurationEncoder
	var encoder zapcore.Encoder
	if format == logJSON {
		encoder = zapcore.NewJSONEncoder(c)
	} else {
		c.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(c)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), level))
}
